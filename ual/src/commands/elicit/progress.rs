//! Progress on stderr: a bar on a terminal, else a line now and then.

use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(5);

pub struct Progress {
    total: usize,
    done: usize,
    /// Answers that an earlier run left: they say nothing about this one's speed.
    before: usize,
    start: Instant,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Progress {
    /// Of `total` answers, `done` are there already.
    pub fn new(total: usize, done: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template("[{bar:30}] {pos}/{len} answers, {eta} left, {msg}");
            let bar = ProgressBar::new(total as u64).with_style(
                style
                    .expect("the template is a constant")
                    .progress_chars("=> "),
            );
            bar.set_position(done as u64);
            bar.reset_eta();
            bar
        });
        let start = Instant::now();
        Self {
            total,
            done,
            before: done,
            start,
            bar,
            last_line: start,
        }
    }

    /// One more answer is on the disk.
    pub fn answered(&mut self) {
        self.done += 1;
    }

    /// One answer less to wait for.
    pub fn gave_up(&mut self) {
        self.total -= 1;
        if let Some(bar) = &self.bar {
            bar.set_length(self.total as u64);
        }
    }

    /// Shows where things stand, with `message`; called often.
    pub fn show(&mut self, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(self.done as u64);
            bar.set_message(message.to_string());
        } else if self.last_line.elapsed() >= PAUSE {
            self.line(message);
        }
    }

    pub fn finish(mut self, message: &str) {
        match self.bar.take() {
            Some(bar) => {
                bar.set_position(self.done as u64);
                bar.abandon_with_message(message.to_string());
            }
            None => self.line(message),
        }
    }

    fn line(&mut self, message: &str) {
        let mut left = String::new();
        if self.done > self.before && self.done < self.total {
            let each = self.start.elapsed().as_secs_f64() / (self.done - self.before) as f64;
            left = format!("{:.0} s left, ", each * (self.total - self.done) as f64);
        }
        // Nobody need listen.
        _ = writeln!(
            std::io::stderr(),
            "{}/{} answers, {left}{message}",
            self.done,
            self.total
        );
        self.last_line = Instant::now();
    }
}
