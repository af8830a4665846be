//! Progress of a training on stderr: a bar on a terminal, else a line now and then.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(5);

pub struct Progress {
    name: String,
    steps: usize,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Progress {
    pub fn new(name: &str, steps: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template("{prefix:12} [{bar:30}] {pos}/{len} {msg} {eta} left");
            ProgressBar::new(steps as u64)
                .with_prefix(name.to_string())
                .with_style(
                    style
                        .expect("the template is a constant")
                        .progress_chars("=> "),
                )
        });
        let last_line = Instant::now();
        Self {
            name: name.to_string(),
            steps,
            bar,
            last_line,
        }
    }

    pub fn step(&mut self, step: usize, loss: f32, tokens_per_second: f64) {
        let message = format!("loss {loss:.4}, {tokens_per_second:.0} tokens/s");
        if let Some(bar) = &self.bar {
            bar.set_position(step as u64);
            bar.set_message(message);
        } else if step == self.steps || self.last_line.elapsed() >= PAUSE {
            eprintln!("{:12} step {step}/{}: {message}", self.name, self.steps);
            self.last_line = Instant::now();
        }
    }

    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish();
        }
    }
}
