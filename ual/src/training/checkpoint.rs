//! A training's whole state in one file, so that it goes on exactly where it was.
//!
//! The order of the batches follows from the seed and the number of steps, so the file holds weights, the optimizer's
//! moments, and what the loss curve has so far.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Tensor, Var};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use crate::{files, report::curve::Curve, training::optimizer::AdamW};

/// Where the trainings of a run have their checkpoints, how often they are written, and whether to begin with what is there.
pub struct Checkpoints {
    pub folder: PathBuf,
    /// Steps from one to the next; the last step has one as well. 0: none.
    pub every: usize,
    pub resume: bool,
    /// What must be the same for a training to go on: arguments and data.
    pub fingerprint: String,
}

/// What the next point and the speed are computed from.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub struct Sums {
    /// Since the last point.
    pub nll: f64,
    pub rows: usize,
    /// Since the beginning.
    pub tokens: usize,
}

/// What is not a tensor.
#[derive(Serialize, Deserialize)]
pub struct Progress {
    pub step: usize,
    pub curve: Curve,
    pub since_point: Sums,
}

const PROGRESS: &str = "progress";
const FINGERPRINT: &str = "fingerprint";

fn names(i: usize) -> [String; 3] {
    ["weight", "first_moment", "second_moment"].map(|what| format!("{what}.{i}"))
}

impl Checkpoints {
    /// Of a training.
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("checkpoint-{name}.safetensors"))
    }

    fn fingerprint(&self, name: &str) -> String {
        format!("{name}, {}", self.fingerprint)
    }

    pub fn is_due(&self, step: usize, steps: usize) -> bool {
        self.every > 0 && (step == steps || step.is_multiple_of(self.every))
    }

    /// Writes beside the old file and takes its place: whenever the program is killed, one of the two is whole.
    pub fn save(
        &self,
        name: &str,
        vars: &[Var],
        optimizer: &AdamW,
        progress: &Progress,
    ) -> Result<()> {
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for (i, (var, moments)) in vars.iter().zip(&optimizer.moments).enumerate() {
            let values = [
                var.as_detached_tensor(),
                moments.first.clone(),
                moments.second.clone(),
            ];
            tensors.extend(names(i).into_iter().zip(values));
        }
        let metadata = HashMap::from([
            (PROGRESS.to_string(), serde_json::to_string(progress)?),
            (FINGERPRINT.to_string(), self.fingerprint(name)),
        ]);
        let path = self.path(name);
        files::replace(&path, |out| {
            files::write_safetensors(out, &tensors, metadata)
        })
        .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Puts the saved state back; none where there is no file, or it is not to be used.
    pub fn load(
        &self,
        name: &str,
        vars: &[Var],
        optimizer: &mut AdamW,
    ) -> Result<Option<Progress>> {
        let path = self.path(name);
        if !self.resume || !path.exists() {
            return Ok(None);
        }
        read(&path, &self.fingerprint(name), vars, optimizer)
            .map(Some)
            .with_context(|| format!("cannot resume from {}", path.display()))
    }
}

fn read(path: &Path, expected: &str, vars: &[Var], optimizer: &mut AdamW) -> Result<Progress> {
    let bytes = fs::read(path)?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
    let metadata = metadata.metadata().clone().unwrap_or_default();
    let (Some(progress), Some(fingerprint)) = (metadata.get(PROGRESS), metadata.get(FINGERPRINT))
    else {
        bail!("it is no checkpoint of this program");
    };
    ensure!(
        fingerprint == expected,
        "it is of a training with other arguments or data:\n{fingerprint}\nnot\n{expected}"
    );
    let progress: Progress = serde_json::from_str(progress)?;
    let device = vars.first().context("nothing is trained")?.device();
    let tensors = candle_core::safetensors::load_buffer(&bytes, device)?;
    let tensor = |name: &str| {
        let tensor = tensors.get(name);
        tensor.with_context(|| format!("it has no {name}"))
    };
    for (i, (var, moments)) in vars.iter().zip(&mut optimizer.moments).enumerate() {
        let [weight, first, second] = names(i);
        var.set(tensor(&weight)?)?;
        moments.first = tensor(&first)?.clone();
        moments.second = tensor(&second)?.clone();
    }
    optimizer.steps = progress.step;
    Ok(progress)
}
