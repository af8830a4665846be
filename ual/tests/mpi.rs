//! `mpirun -n N ual finetune`, by parts of batches and by classes: what one process does, up to rounding; a killed process ends the
//! others, and the run goes on from its checkpoints.
//!
//!     cargo test --release -p candle-ual --features mpi --test mpi

use std::{
    fs,
    path::Path,
    process::{Child, Command, ExitCode, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(120);

fn command(processes: usize, arguments: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["--oversubscribe", "--allow-run-as-root", "-n"])
        .arg(processes.to_string())
        .arg(env!("CARGO_BIN_EXE_ual"))
        .args(arguments)
        .env("RAYON_NUM_THREADS", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn end(mut child: Child) -> Output {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < LIMIT, "a process waits for another one");
        thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn arguments<'a>(out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let small = [
        "finetune",
        "--dim",
        "16",
        "--layers",
        "1",
        "--heads",
        "2",
        "--pretrain-steps",
        "4",
        "--batch",
        "7",
        "--out",
    ];
    [&small[..], &[out.to_str().unwrap()], more].concat()
}

fn metrics(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("metrics.json")).unwrap()).unwrap()
}

/// Loss curve and held-out results of each training.
fn numbers(metrics: &Value) -> Vec<f64> {
    let mut numbers = Vec::new();
    for run in metrics["runs"].as_array().unwrap() {
        for point in run["training"]["points"].as_array().unwrap() {
            numbers.extend(["train_nll", "held_out_nll"].map(|name| point[name].as_f64().unwrap()));
        }
    }
    assert!(numbers.len() >= 12, "{metrics}");
    numbers
}

/// One of two is killed in the middle, and both are started again.
fn goes_on_after_a_kill(out: &Path, more: &[&str]) {
    let steps = [&["--steps", "60", "--checkpoint-every", "1"], more].concat();
    let child = command(2, &arguments(out, &steps)).spawn().unwrap();
    let checkpoint = out.join("checkpoint-SFT.safetensors");
    let started = Instant::now();
    while !checkpoint.exists() {
        assert!(started.elapsed() < LIMIT, "no checkpoint");
        thread::sleep(Duration::from_millis(2));
    }
    let killed = Command::new("pkill")
        .args(["-KILL", "-n", "-f"])
        .arg(format!("^{}.*{}", env!("CARGO_BIN_EXE_ual"), out.display()))
        .status()
        .unwrap();
    assert!(killed.success());
    let started = Instant::now();
    let output = end(child);
    assert!(!output.status.success(), "a process was killed");
    assert!(started.elapsed() < Duration::from_secs(30));
    assert!(
        !out.join("metrics.json").exists(),
        "it was to be killed before its end"
    );
    println!(
        "ok   a killed process ends the others ({:.1} s)",
        started.elapsed().as_secs_f64()
    );
    let resumed = [&steps[..], &["--resume"]].concat();
    let output = end(command(2, &arguments(out, &resumed)).spawn().unwrap());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let whole = out.with_extension("whole");
    let output = end(command(2, &arguments(&whole, &steps)).spawn().unwrap());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(numbers(&metrics(out)), numbers(&metrics(&whole)));
    println!("ok   and the run goes on as if nothing had happened");
}

fn main() -> ExitCode {
    let folder = TempDir::new().unwrap();
    let out = |name: &str| folder.path().join(name);

    let run = |name: &str, processes: usize, more: &[&str]| {
        let out = out(name);
        let more = [&["--steps", "4"], more].concat();
        let output = end(command(processes, &arguments(&out, &more)).spawn().unwrap());
        assert!(output.status.success(), "{}", text(&output.stderr));
        let stdout = text(&output.stdout);
        assert_eq!(stdout.matches("parameters trained").count(), 1, "{stdout}");
        numbers(&metrics(&out))
    };
    let alone = run("alone", 1, &[]);
    let by_classes = &["--vocab-parallel"][..];
    assert_eq!(run("all-classes", 1, by_classes), alone);
    for (processes, more) in [
        (2, &[][..]),
        (3, &[]),
        (4, &[]),
        (2, by_classes),
        (3, by_classes),
        (3, &["--vocab-parallel", "--loss", "logits"]),
    ] {
        let together = run(&format!("of{processes}{}", more.concat()), processes, more);
        assert_eq!(together.len(), alone.len());
        for (a, b) in together.iter().zip(&alone) {
            assert!(
                (a - b).abs() < 1e-3,
                "{a} of {processes} processes {more:?}, {b} of one"
            );
        }
        println!("ok   {processes} processes {more:?} train as one");
    }

    // What the first refuses ends all.
    let output = end(
        command(3, &arguments(&out("bad"), &["--data", "no-such-file"]))
            .spawn()
            .unwrap(),
    );
    assert!(!output.status.success() && text(&output.stderr).contains("no-such-file"));
    println!("ok   bad arguments end all");
    let study = end(command(2, &["study"]).spawn().unwrap());
    assert!(text(&study.stderr).contains("ual study is one process; 2 were started"));

    goes_on_after_a_kill(&out("killed"), &[]);
    goes_on_after_a_kill(&out("killed-by-classes"), by_classes);
    ExitCode::SUCCESS
}
