//! How far a long job is, on stderr: a bar on a terminal, else a line now and then.

use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(5);

pub struct Meter {
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Meter {
    /// Of `length` parts; `template` is the bar's, as indicatif has them.
    pub fn new(template: &str, length: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(template);
            let style = style.expect("the template is a constant");
            ProgressBar::new(length as u64).with_style(style.progress_chars("=> "))
        });
        Self {
            bar,
            last_line: Instant::now(),
        }
    }

    /// None where there is no terminal.
    pub fn bar(&self) -> Option<&ProgressBar> {
        self.bar.as_ref()
    }

    /// Whether it is time for another line.
    pub fn is_due(&self) -> bool {
        self.last_line.elapsed() >= PAUSE
    }

    pub fn line(&mut self, text: &str) {
        _ = writeln!(std::io::stderr(), "{text}"); // nobody need listen
        self.last_line = Instant::now();
    }
}
