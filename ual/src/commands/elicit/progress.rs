//! Progress of the answers on stderr.

use std::time::Instant;

use crate::report::meter::Meter;

pub struct Progress {
    total: usize,
    done: usize,
    /// Answers that will not come.
    failed: usize,
    /// Answers that an earlier run left: they say nothing about this one's speed.
    before: usize,
    start: Instant,
    meter: Meter,
}

impl Progress {
    /// Of `total` answers, `done` are there already.
    pub fn new(total: usize, done: usize) -> Self {
        let template = "[{bar:30}] {pos}/{len} answers, {eta} left, {msg}";
        let meter = Meter::new(template, total);
        if let Some(bar) = meter.bar() {
            bar.set_position(done as u64);
            bar.reset_eta();
        }
        Self {
            total,
            done,
            failed: 0,
            before: done,
            start: Instant::now(),
            meter,
        }
    }

    /// One more answer is on the disk.
    pub fn answered(&mut self) {
        self.done += 1;
    }

    /// One answer less to wait for; the total stays what was asked for.
    pub fn gave_up(&mut self) {
        self.failed += 1;
    }

    /// Shows where things stand, with `message`; called often.
    pub fn show(&mut self, message: &str) {
        if let Some(bar) = self.meter.bar() {
            bar.set_position(self.done as u64);
            bar.set_message(self.failures() + message);
        } else if self.meter.is_due() {
            self.line(message);
        }
    }

    pub fn finish(mut self, message: &str) {
        if let Some(bar) = self.meter.bar() {
            bar.set_position(self.done as u64);
            bar.abandon_with_message(self.failures() + message);
        } else {
            self.line(message);
        }
    }

    fn failures(&self) -> String {
        match self.failed {
            0 => String::new(),
            failed => format!("{failed} not to be had, "),
        }
    }

    fn line(&mut self, message: &str) {
        let mut left = self.failures();
        if self.done > self.before && self.done + self.failed < self.total {
            let each = self.start.elapsed().as_secs_f64() / (self.done - self.before) as f64;
            let missing = self.total - self.done - self.failed;
            left += &format!("{:.0} s left, ", each * missing as f64);
        }
        let (done, total) = (self.done, self.total);
        self.meter
            .line(&format!("{done}/{total} answers, {left}{message}"));
    }
}
