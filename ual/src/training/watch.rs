//! What a training is measured on along the way, and what early stopping would have kept of it.

use anyhow::{Context, Result};

use crate::{
    data::samples::Sample,
    model::decoder::Decoder,
    report::{
        curve::{Measured, Stopped},
        metrics::{self, Row},
        run::groups,
        units::units,
    },
    training::evaluate::{evaluate, evaluate_each},
};

/// Samples that are not trained on.
#[derive(Clone, Copy, Default)]
pub struct Watch<'a> {
    /// To report on.
    pub held_out: &'a [Sample],
    /// To choose by; there need be none.
    pub validation: &'a [Sample],
    /// Of the held-out samples' uncertainties: certain below it, else uncertain.
    pub threshold: f32,
    /// Names of the kinds of samples.
    pub groups: &'a [String],
}

impl Watch<'_> {
    /// Of the held-out samples.
    pub fn measure(&self, model: &Decoder, batch: usize) -> Result<Measured> {
        let samples: Vec<&Sample> = self.held_out.iter().collect();
        let each = evaluate_each(model, &samples, batch)?;
        let rows = each.concat();
        let of = |include: &dyn Fn(&Row) -> bool| units(&samples, &each, include);
        let mut parts = vec![
            of(&|_| true),
            of(&|row| row.uncertainty < self.threshold),
            of(&|row| row.uncertainty >= self.threshold),
        ];
        parts.extend((0..self.groups.len()).map(|group| of(&|row| row.group == group)));
        Ok(Measured {
            groups: groups(&rows, self.threshold, self.groups),
            units: parts,
        })
    }

    /// The validation NLL after a step; none without validation samples. Where it is less than any before, `stopped` becomes
    /// what stopping here keeps: the held-out samples are measured, and no weights need be kept.
    pub fn after(
        &self,
        step: usize,
        stopped: &mut Option<Stopped>,
        model: &Decoder,
        batch: usize,
    ) -> Result<Option<f64>> {
        if self.validation.is_empty() {
            return Ok(None);
        }
        let samples: Vec<&Sample> = self.validation.iter().collect();
        let rows = evaluate(model, &samples, batch)?;
        let nll = metrics::mean(rows.iter().map(|row| row.nll)).context("no validation rows")?;
        if stopped
            .as_ref()
            .is_none_or(|best| nll < best.validation_nll)
        {
            *stopped = Some(Stopped {
                step,
                validation_nll: nll,
                held_out: self.measure(model, batch)?,
            });
        }
        Ok(Some(nll))
    }
}
