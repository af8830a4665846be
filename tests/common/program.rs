//! The examples as programs.

use std::path::{Path, PathBuf};

/// The example `name`, which `cargo test` has built but names no path to: beside the test's own folder.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let folder = test.parent().and_then(Path::parent).expect("target/…/deps");
    let program = folder.join("examples").join(name);
    let program = program.with_extension(std::env::consts::EXE_EXTENSION);
    assert!(program.exists(), "cargo build --example {name} first");
    program
}
