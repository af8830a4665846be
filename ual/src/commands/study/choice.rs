//! What validation chooses: of an arm's trainings, which differ in their smoothing, one, and where to stop it.

use crate::report::curve::Curve;

/// One of an arm's trainings, up to a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Its number among the arm's.
    pub training: usize,
    pub step: usize,
}

/// Each training's points of validation: its number, the step and the NLL.
fn points<'a>(curves: &'a [&Curve]) -> impl Iterator<Item = (Choice, f64)> + 'a {
    curves.iter().enumerate().flat_map(|(training, curve)| {
        curve.points.iter().filter_map(move |point| {
            let step = point.step;
            Some((Choice { training, step }, point.validation_nll?))
        })
    })
}

/// The first of equals.
fn least(points: impl Iterator<Item = (Choice, f64)>) -> Option<Choice> {
    let least = points.min_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(least.0)
}

/// The training with the least validation NLL at its end. A training alone needs no validation to be chosen.
pub fn at_end(curves: &[&Curve]) -> Option<Choice> {
    if let [curve] = curves {
        return Some(Choice {
            training: 0,
            step: curve.points.last()?.step,
        });
    }
    let is_last = |choice: &Choice| {
        let last = curves[choice.training].points.last();
        last.is_some_and(|last| last.step == choice.step)
    };
    least(points(curves).filter(|(choice, _)| is_last(choice)))
}

/// The training and the step with the least validation NLL; none without validation.
pub fn early(curves: &[&Curve]) -> Option<Choice> {
    least(points(curves))
}
