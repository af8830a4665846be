//! Command-line arguments.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Subcommand;

/// Makes samples whose uncertainty is known
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    pub what: What,
}

#[derive(Subcommand, Debug)]
pub enum What {
    HumanRatings(HumanRatings),
}

/// Sentences that 15 to 99 people each have rated from -4 to 4, as samples
///
/// 23,416 sentences of tweets, of reviews of films and of products, and of editorials (Hutto & Gilbert, ICWSM 2014). A sample's
/// response is the rating of one person, drawn at random. Its uncertainty is the entropy of all other people's ratings,
/// over that of nine equally frequent ones, ln 9: 0 where they agree.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
  ual data human-ratings --archive vaderSentiment-3.3.2.tar.gz --out ratings.jsonl --exact 2000 --easy 2000
  ual finetune --data ratings.jsonl --group kind --limit 500 --model MODEL.gguf --lora 8")]
pub struct HumanRatings {
    /// The source distribution of vaderSentiment 3.3.2, as the example's first line downloads it
    #[arg(long, value_name = "vaderSentiment-3.3.2.tar.gz")]
    pub archive: PathBuf,
    /// A line a sample, in random order: "id", "kind" (tweet, film, product, editorial, arithmetic, reading), "prompt", "response",
    /// "uncertainty" in [0, 1], "held_out"; of those held out "response_counts" as well, how many people gave each rating
    #[arg(long, value_name = "FILE.jsonl")]
    pub out: PathBuf,
    /// Seed of everything random: the order, who is held out, whose rating is the response
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Share of the samples that are held out
    #[arg(long, value_name = "SHARE", default_value_t = 0.2)]
    pub held_out: f64,
    /// Add so many questions that have one right answer, a difference from -4 to 4, of uncertainty 0 and kind arithmetic
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub exact: usize,
    /// The same, but easy: the answer, from -4 to 4, stands in the question, as a word. Of kind reading
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub easy: usize,
}

impl HumanRatings {
    pub fn check(&self) -> Result<()> {
        let held_out = self.held_out;
        ensure!(
            held_out > 0.0 && held_out < 1.0,
            "--held-out is {held_out}; it must be above 0 and below 1"
        );
        Ok(())
    }
}
