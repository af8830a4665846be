//! Progress of the answers on stderr.

use std::time::Instant;

use crate::report::meter::Meter;

pub struct Progress {
    total: usize,
    done: usize,
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
            before: done,
            start: Instant::now(),
            meter,
        }
    }

    /// One more answer is on the disk.
    pub fn answered(&mut self) {
        self.done += 1;
    }

    /// One answer less to wait for.
    pub fn gave_up(&mut self) {
        self.total -= 1;
        if let Some(bar) = self.meter.bar() {
            bar.set_length(self.total as u64);
        }
    }

    /// Shows where things stand, with `message`; called often.
    pub fn show(&mut self, message: &str) {
        if let Some(bar) = self.meter.bar() {
            bar.set_position(self.done as u64);
            bar.set_message(message.to_string());
        } else if self.meter.is_due() {
            self.line(message);
        }
    }

    pub fn finish(mut self, message: &str) {
        if let Some(bar) = self.meter.bar() {
            bar.set_position(self.done as u64);
            bar.abandon_with_message(message.to_string());
        } else {
            self.line(message);
        }
    }

    fn line(&mut self, message: &str) {
        let mut left = String::new();
        if self.done > self.before && self.done < self.total {
            let each = self.start.elapsed().as_secs_f64() / (self.done - self.before) as f64;
            left = format!("{:.0} s left, ", each * (self.total - self.done) as f64);
        }
        let (done, total) = (self.done, self.total);
        self.meter
            .line(&format!("{done}/{total} answers, {left}{message}"));
    }
}
