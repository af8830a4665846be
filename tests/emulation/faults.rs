//! The emulation's own kernels, right and wrong: what it must report, and how.

use std::process::Command;

use super::build::{Build, self_test};

/// The emulation's own kernels, right and wrong, clusters and bulk copies among them.
pub fn faults_are_reported(build: Build) {
    // What is said in every build, or by (plain, sanitized, races).
    let everywhere = |text| [text; 3];
    let faults = [
        (
            "missing_lane",
            everywhere("threads meet at different places"),
        ),
        (
            "divergent_barrier",
            everywhere("threads meet at different places"),
        ),
        (
            "no_wait_for_kernels",
            [
                "did not wait for earlier kernels has ended",
                "did not wait for earlier kernels has ended",
                "input before earlier kernels have ended",
            ],
        ),
        (
            "copy_before_wait",
            everywhere("a bulk copy before earlier kernels have ended"),
        ),
        ("early_return", everywhere("deadlock")),
        (
            "misaligned",
            everywhere("16-byte access at a misaligned address"),
        ),
        (
            "shared_overrun",
            ["wrong result", "out of bounds", "wrong result"],
        ),
        (
            "no_barrier",
            ["wrong result", "wrong result", "race in shared memory"],
        ),
        (
            "no_barrier_before_reuse",
            ["wrong result", "wrong result", "race in shared memory"],
        ),
        (
            "rows_collide",
            ["wrong result", "wrong result", "race in output"],
        ),
        ("no_mbarrier", everywhere("not initialised")),
        ("no_barrier_after_init", everywhere("not initialised")),
        ("no_fence", everywhere("no fence")),
        ("wrong_byte_count", everywhere("waiting for an mbarrier")),
        (
            "copy_too_far",
            everywhere("outside the block's dynamic shared memory"),
        ),
        (
            "no_wait",
            ["wrong result", "wrong result", "race in shared memory"],
        ),
        (
            "no_cluster_barrier",
            everywhere("before it is known to have started"),
        ),
        ("no_cluster_arrival", everywhere("without an arrival")),
        ("wrong_rank", everywhere("rank 4 of 4 blocks")),
        ("block_ends_early", everywhere("a block ended before")),
        ("too_many_senders", everywhere("waiting for an mbarrier")),
        (
            "too_few_senders",
            [
                "a block ended before",
                "a block ended before",
                "race in shared memory",
            ],
        ),
        (
            "no_wait_for_messages",
            [
                "a block ended before",
                "a block ended before",
                "race in shared memory",
            ],
        ),
    ];
    let run = |fault: &str| {
        Command::new(self_test(build))
            .arg(fault)
            .output()
            .expect("the self-test runs")
    };
    let right = run("none");
    assert!(
        right.status.success(),
        "{}",
        String::from_utf8_lossy(&right.stderr)
    );
    for (fault, texts) in faults {
        let output = run(fault);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{fault} is not noticed");
        assert!(
            said.contains(texts[build as usize]),
            "{fault} is reported as: {said}"
        );
    }
}
