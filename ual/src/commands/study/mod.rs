//! `ual study` gathers evidence: plain fine-tuning, constant smoothing of the same mean, uncertainty-aware smoothing, and
//! the control in which the same uncertainties are dealt to the samples at random, over several seeds; held-out metrics and
//! the clustering of tokens in the last hidden layer, as mean ± deviation over seeds, in a Markdown report with pictures.
//! One more arm, on the CPU, has UAL's smoothing spread by the tokens' frequencies in place of evenly (`--smoothing-prior
//! unigram` has all arms do it). With `--group` there is a second control, dealt within each kind of samples: what it lacks is
//! what uncertainties say beyond the kind.
//!
//! All options of `ual finetune` are its own. A seed changes data, batches, the control and the weights that training begins
//! with (of a given model, those of its adapters).

pub mod args;
pub mod arms;
pub mod clusters;
pub mod outcome;
pub mod pictures;
pub mod run;
pub mod summary;
