//! Progress of a training on stderr.

use crate::report::meter::Meter;

pub struct Progress {
    name: String,
    steps: usize,
    meter: Meter,
}

impl Progress {
    pub fn new(name: &str, steps: usize) -> Self {
        let template = format!("{name:12} [{{bar:30}}] {{pos}}/{{len}} {{msg}} {{eta}} left");
        Self {
            name: name.to_string(),
            steps,
            meter: Meter::new(&template, steps),
        }
    }

    pub fn step(&mut self, step: usize, loss: f32, tokens_per_second: f64) {
        let message = format!("loss {loss:.4}, {tokens_per_second:.0} tokens/s");
        if let Some(bar) = self.meter.bar() {
            bar.set_position(step as u64);
            bar.set_message(message);
        } else if step == self.steps || self.meter.is_due() {
            let (name, steps) = (&self.name, self.steps);
            self.meter
                .line(&format!("{name:12} step {step}/{steps}: {message}"));
        }
    }

    pub fn finish(self) {
        if let Some(bar) = self.meter.bar() {
            bar.finish();
        }
    }
}
