//! Ranks that are threads, for the tests of what ranks do together.

use std::{
    process::abort,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use candle_core::Result;
use candle_cross_entropy::parallel::{Communicator, threads};

pub type Comm = Arc<dyn Communicator>;

/// What `f` gives on each of so many ranks, in rank order. A rank that waits for a minute ends the program: a test must not.
pub fn ranks<R: Send>(size: usize, f: impl Fn(Comm) -> R + Sync) -> Vec<R> {
    let (done, end) = mpsc::channel();
    thread::spawn(move || {
        if end.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("a rank waits for another one");
            abort();
        }
    });
    let results = thread::scope(|scope| {
        let f = &f;
        let spawn = |comm| scope.spawn(move || f(comm));
        let handles: Vec<_> = threads(size).into_iter().map(spawn).collect();
        let join = |handle: thread::ScopedJoinHandle<R>| handle.join().expect("no panic");
        handles.into_iter().map(join).collect()
    });
    let _ = done.send(()); // whoever waits may be gone
    results
}

/// Each rank's error.
pub fn errors(size: usize, f: impl Fn(Comm) -> Result<()> + Sync) -> Vec<String> {
    let results = ranks(size, f);
    let message = |result: Result<()>| result.expect_err("an error on every rank").to_string();
    results.into_iter().map(message).collect()
}

#[track_caller]
pub fn assert_all_say(errors: &[String], parts: &[&str]) {
    for error in errors {
        for part in parts {
            assert!(error.contains(part), "{error:?} must say {part:?}");
        }
    }
}
