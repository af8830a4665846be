//! What the checks found: a line each as they run, a table and JSON at the end.

use std::{path::Path, process::ExitCode};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// The largest error of a check, in units of its tolerance, and where it was.
#[derive(Clone, Default)]
pub struct Worst {
    pub error: f64,
    pub at: String,
}

impl Worst {
    /// Takes in one comparison; NaN counts as a failure.
    pub fn see(&mut self, error: f64, at: impl FnOnce() -> String) {
        let error = if error.is_nan() { f64::INFINITY } else { error };
        if error > self.error || self.at.is_empty() {
            *self = Self { error, at: at() };
        }
    }

    pub fn merge(&mut self, other: Self) {
        if !other.at.is_empty() {
            self.see(other.error, || other.at);
        }
    }
}

#[derive(Default)]
pub struct Report {
    checks: Vec<Value>,
    failures: usize,
    pub timings: Vec<Value>,
}

impl Report {
    /// Runs a check that compares numbers; an error above 1 tolerance fails it.
    pub fn numbers(&mut self, name: &str, check: impl FnOnce() -> Result<Worst>) {
        match check() {
            Ok(worst) if worst.at.is_empty() => {
                self.line(name, false, "compared nothing".into(), None)
            }
            Ok(worst) => {
                let detail = format!("worst {:.3} of its tolerance ({})", worst.error, worst.at);
                self.line(name, worst.error <= 1.0, detail, Some(worst.error));
            }
            Err(error) => self.line(name, false, format!("{error:#}"), None),
        }
    }

    /// Runs a check that holds or does not; it says what it looked at.
    pub fn holds(&mut self, name: &str, check: impl FnOnce() -> Result<String>) {
        match check() {
            Ok(detail) => self.line(name, true, detail, None),
            Err(error) => self.line(name, false, format!("{error:#}"), None),
        }
    }

    fn line(&mut self, name: &str, pass: bool, detail: String, worst: Option<f64>) {
        println!("{} {name}: {detail}", if pass { "PASS" } else { "FAIL" });
        self.failures += usize::from(!pass);
        let worst = worst.filter(|w| w.is_finite());
        self.checks
            .push(json!({ "check": name, "pass": pass, "worst": worst, "detail": detail }));
    }

    /// Writes everything so far, if there is a file to write it to.
    pub fn write(&self, out: Option<&Path>) -> Result<()> {
        let Some(path) = out else { return Ok(()) };
        let all = json!({ "checks": self.checks, "timings": self.timings });
        std::fs::write(path, serde_json::to_string_pretty(&all)? + "\n")
            .with_context(|| format!("writing {}", path.display()))
    }

    pub fn finish(self, out: Option<&Path>) -> Result<ExitCode> {
        let is_linear = |t: &&Value| t["d"].is_number();
        let of_logits: Vec<_> = self.timings.iter().filter(|t| !is_linear(t)).collect();
        let linear: Vec<_> = self.timings.iter().filter(is_linear).collect();
        if !of_logits.is_empty() {
            println!(
                "\n{:<32}{:<12}{:>7}{:>8} {:<6}{:>10}{:>10}{:>10}{:>9}{:>8}",
                "work", "by", "n", "v", "type", "median ms", "p10", "p90", "GB/s", "copy"
            );
        }
        for t in of_logits {
            print!(
                "{:<32}{:<12}{:>7}{:>8} {:<6}",
                text(t, "bench"),
                text(t, "impl"),
                t["n"],
                t["v"],
                text(t, "dtype")
            );
            match t["skipped"].as_str() {
                Some(why) => println!("  skipped: {why}"),
                None => println!(
                    "{:>10.4}{:>10.4}{:>10.4}{:>9.0}{:>7.0}%",
                    number(t, "median_ms"),
                    number(t, "p10_ms"),
                    number(t, "p90_ms"),
                    number(t, "gb_per_s"),
                    100.0 * number(t, "fraction_of_copy")
                ),
            }
        }
        if !linear.is_empty() {
            println!(
                "\n{:<42}{:<44}{:>8}{:>10}{:>10}{:>10}{:>9}{:>10}{:>11}",
                "work", "by", "v", "median ms", "p10", "p90", "TFLOP/s", "products", "MiB beyond"
            );
        }
        for t in linear {
            println!(
                "{:<42}{:<44}{:>8}{:>10.3}{:>10.3}{:>10.3}{:>9.0}{:>9.0}%{:>11.0}",
                text(t, "bench"),
                text(t, "impl"),
                t["v"],
                number(t, "median_ms"),
                number(t, "p10_ms"),
                number(t, "p90_ms"),
                number(t, "tflop_per_s"),
                100.0 * number(t, "fraction_of_products"),
                (number(t, "peak_bytes") - number(t, "gradient_bytes")) / 1048576.0
            );
        }
        let (total, failures) = (self.checks.len(), self.failures);
        println!("\n{} of {total} checks passed", total - failures);
        self.write(out)?;
        Ok(if failures == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

fn text(timing: &Value, key: &str) -> String {
    timing[key].as_str().unwrap_or("").to_string()
}

fn number(timing: &Value, key: &str) -> f64 {
    timing[key].as_f64().unwrap_or(f64::NAN)
}
