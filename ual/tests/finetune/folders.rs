//! The folder of results: what a killed run leaves in it, who may read it, and who may write.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use crate::pretrained::{Setup, write_folder};

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// The system kills a program that writes more than a limit of its own: each time in the middle of the first checkpoint.
#[test]
fn a_run_killed_in_a_checkpoint_leaves_nothing_to_the_next() {
    let setup = Setup::new(20);
    let out = setup.folder.path().join("out");
    let more = ["--checkpoint-every", "2", "--resume"];
    for _ in 0..3 {
        let whole = setup.command("out", &more);
        let limited = Command::new("sh")
            .args(["-c", "ulimit -c 0; ulimit -f 40; exec \"$0\" \"$@\""])
            .arg(whole.get_program())
            .args(whole.get_args())
            .output()
            .unwrap();
        assert!(limited.status.code().is_none(), "{limited:?}");
        assert_eq!(names(&out), [".lock", "checkpoint-SFT.partial"]);
    }
    fs::create_dir(out.join("model")).unwrap();
    fs::write(out.join("model/model.partial"), "half").unwrap();
    setup.run("out", &more);
    let expected = [
        ".lock",
        "checkpoint-SFT.safetensors",
        "checkpoint-UAL.safetensors",
        "checkpoint-constant.safetensors",
        "losses.svg",
        "metrics.json",
        "model",
        "reliability.svg",
        "smoothing_map.json",
    ];
    assert_eq!(names(&out), expected);
    assert_eq!(names(&out.join("model")), ["model.gguf"]);
}

#[test]
fn who_may_read_one_result_may_read_all() {
    let mut setup = Setup::new(20);
    setup.model = write_folder(setup.folder.path());
    setup.run("out", &["--checkpoint-every", "3"]);
    let out = setup.folder.path().join("out");
    let mode = |name: &str| {
        let found = fs::metadata(out.join(name)).unwrap();
        found.permissions().mode() & 0o777
    };
    for name in ["checkpoint-SFT.safetensors", "model/model.safetensors"] {
        assert_eq!(mode(name), mode("metrics.json"), "{name}");
    }
}

#[test]
fn one_process_writes_into_a_folder() {
    let setup = Setup::new(20);
    let mut first = setup
        .command("out", &["--steps", "1000000"])
        .spawn()
        .unwrap();
    let lock = setup.folder.path().join("out/.lock");
    let start = Instant::now();
    while !lock.exists() && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(50)); // from the lock's file to the lock
    let text = setup.refusal("out", &[]);
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(
        text.contains("another process is writing into this folder"),
        "{text}"
    );
    setup.run("out", &[]);
}

/// At once: before the model is read, which is none here.
#[test]
fn what_is_no_folder_is_refused() {
    let mut setup = Setup::new(20);
    setup.model = setup.folder.path().join("nothing");
    fs::write(setup.folder.path().join("file"), "text").unwrap();
    for out in ["/dev/stdout", "file"] {
        let text = setup.refusal(out, &[]);
        assert!(
            text.contains("which is no folder") && text.contains(out),
            "{text}"
        );
    }
}
