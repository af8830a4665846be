//! When to ask again: what a server says about its limits, and what to do where it says nothing.

use std::{
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime},
};

use rand::Rng;
use ureq::http::HeaderMap;

/// Longest wait that is not the server's wish.
const LONGEST: Duration = Duration::from_secs(60);
/// How long a sleeping thread may overlook that the program ends.
const NAP: Duration = Duration::from_millis(50);

/// Wait before repetition `repetition`, counted from 0: doubled each time, and between half of that and all, at random, so
/// that requests which failed together are not repeated together.
pub fn backoff(first: Duration, repetition: u32) -> Duration {
    let whole = first
        .saturating_mul(1 << repetition.min(16))
        .min(LONGEST.max(first));
    whole.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// Wait that the answer to a failed request asks for, if any.
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok().map(str::trim);
    if let Some(milliseconds) = text("retry-after-ms").and_then(|text| text.parse().ok()) {
        return Duration::try_from_secs_f64(f64::max(milliseconds, 0.0) / 1e3).ok();
    }
    let Some(after) = text("retry-after") else {
        return exhausted(headers);
    };
    match after.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Err(_) => {
            let date = httpdate::parse_http_date(after).ok()?;
            Some(date.duration_since(SystemTime::now()).unwrap_or_default()) // a date in the past: no wait
        }
    }
}

/// Wait until a limit that is used up, of requests or of tokens, is reset: from the x-ratelimit headers.
pub fn exhausted(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: String| headers.get(name)?.to_str().ok().map(str::trim);
    ["requests", "tokens"]
        .into_iter()
        .filter(|what| text(format!("x-ratelimit-remaining-{what}")) == Some("0"))
        .filter_map(|what| duration(text(format!("x-ratelimit-reset-{what}"))?))
        .max()
}

/// Reads `1h2m`, `6m0s`, `1.5s`, `20ms`, or a number of seconds.
fn duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let unit = rest.find(|c: char| c != '.' && !c.is_ascii_digit())?;
        let (number, tail) = rest.split_at(unit);
        let end = tail
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let scale = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * scale;
        rest = tail;
    }
    Duration::try_from_secs_f64(seconds).ok()
}

/// A time before which no request is sent. A server's limits hold for all requests, so all wait for the same one.
pub struct Gate(Mutex<Instant>);

impl Gate {
    pub fn new() -> Self {
        Self(Mutex::new(Instant::now()))
    }

    /// Lets nothing pass for `wait` from now, or longer where that was said before.
    pub fn close(&self, wait: Duration) {
        let mut until = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *until = (*until).max(Instant::now() + wait);
    }

    /// How long the gate stays closed.
    pub fn left(&self) -> Duration {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .saturating_duration_since(Instant::now())
    }

    /// Waits until the gate is open, or `stop` says true.
    pub fn pass(&self, stop: impl Fn() -> bool) {
        loop {
            let left = self.left();
            if left.is_zero() || stop() {
                return;
            }
            thread::sleep(left.min(NAP));
        }
    }
}

/// Sleeps for `wait`, or until `stop` says true.
pub fn sleep(wait: Duration, stop: impl Fn() -> bool) {
    let pause = Gate::new();
    pause.close(wait);
    pause.pass(stop);
}
