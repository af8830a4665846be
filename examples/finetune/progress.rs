//! Progress of a training on stderr: a bar on a terminal, else a line now and then.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

pub struct Progress {
    name: String,
    steps: usize,
    bar: Option<ProgressBar>,
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
        Self {
            name: name.to_string(),
            steps,
            bar,
        }
    }

    pub fn step(&mut self, step: usize, loss: f32, tokens_per_second: f64) {
        let message = format!("loss {loss:.4}, {tokens_per_second:.0} tokens/s");
        match &self.bar {
            Some(bar) => {
                bar.set_position(step as u64);
                bar.set_message(message);
            }
            None if step * 5 / self.steps > (step - 1) * 5 / self.steps => {
                eprintln!("{:12} step {step}/{}: {message}", self.name, self.steps);
            }
            None => {}
        }
    }

    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish();
        }
    }
}
