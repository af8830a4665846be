//! The answers on the disk: killed at random moments the program loses nothing and asks nothing twice, torn lines are
//! repaired, and what is another's is left alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, OpenOptions},
    io::Write,
    path::Path,
    process::Child,
    thread,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use crate::{
    job::{Job, Run, line, percent},
    server::{Response, Server},
};

/// Killed at random moments and started again until done.
fn killed(samples: usize, votes: usize, seed: u64) {
    let server = Server::start(|asked| Response::uncertainty(percent(asked.sample)).after(8));
    let job = Job::new(samples);
    let (out, partial) = (job.path("out.jsonl"), job.path("out.jsonl.votes"));
    let mut rng = StdRng::seed_from_u64(seed);
    let whole_lines = |path: &Path| -> String {
        let text = fs::read_to_string(path).unwrap_or_default();
        text[..text.rfind('\n').map_or(0, |at| at + 1)].to_string()
    };
    let mut kills = 0;
    for run in 0u64.. {
        // Answers on the disk, by sample.
        let before = whole_lines(&out);
        let id = |line: &str| -> usize {
            let line: Value = serde_json::from_str(line).unwrap();
            line["id"].as_str().unwrap()[1..].parse().unwrap()
        };
        let mut there: BTreeMap<usize, usize> = BTreeMap::new();
        whole_lines(&partial)
            .lines()
            .for_each(|line| *there.entry(id(line)).or_default() += 1);
        before
            .lines()
            .for_each(|line| _ = there.insert(id(line), votes));

        let mut child = job
            .remote(
                &server,
                &[
                    "--votes",
                    &votes.to_string(),
                    "--body",
                    &format!("{{\"user\": {run}}}"),
                ],
            )
            .spawn()
            .unwrap();
        let ended = wait(
            &mut child,
            Duration::from_millis(rng.random_range(5..60 + 10 * run)),
        );
        if !ended {
            child.kill().unwrap();
            kills += 1;
        }
        let result = Run::of(child.wait_with_output().unwrap());

        assert!(
            whole_lines(&out).starts_with(&before),
            "a line that was there is gone"
        );
        for sample in 0..samples {
            let user = Value::from(run);
            let requests = server
                .asked()
                .iter()
                .filter(|a| a.sample == sample && a.body["user"] == user)
                .count();
            let allowed = votes - there.get(&sample).unwrap_or(&0);
            assert!(
                requests <= allowed,
                "sample {sample} asked {requests} times, lacking {allowed} answers"
            );
        }
        if ended {
            result.expect(0);
            break;
        }
        // A kill hardly ever meets a write that is half done, so half a line is added by hand.
        let torn = if votes > 1 && run % 2 == 0 {
            &partial
        } else {
            &out
        };
        let whole = fs::read(torn).is_ok_and(|text| text.last().is_none_or(|&byte| byte == b'\n'));
        if run % 3 != 0 && whole {
            let mut file = OpenOptions::new().append(true).open(torn).unwrap();
            let half = if torn == &partial {
                r#"{"id":"s1","sample":"0123456789"#.to_string()
            } else {
                line(1)
            };
            file.write_all(&half.as_bytes()[..rng.random_range(1..30)])
                .unwrap();
        }
    }
    assert!(kills >= 3, "{kills} kills");
    // What a kill loses is on its way at that moment: a request of each of four threads, and the answer being written.
    let asked = server.asked().len();
    assert!(
        asked <= samples * votes + 5 * kills,
        "{asked} requests, {kills} kills"
    );
    let scored = job.scored();
    assert_eq!(scored.len(), samples);
    for i in 0..samples {
        let line = &scored[&format!("s{i}")];
        let u = percent(i) as f64 / 100.0;
        assert_eq!(line["votes"], json!(vec![u; votes]));
        assert!((line["uncertainty"].as_f64().unwrap() - u).abs() < 1e-12);
        assert_eq!(line["completion_tokens"], 3 * votes);
    }
    assert!(!partial.exists());
}

fn wait(child: &mut Child, time: Duration) -> bool {
    let end = Instant::now() + time;
    while Instant::now() < end {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        thread::sleep(Duration::from_millis(1));
    }
    false
}

#[test]
fn killed_at_any_moment_it_loses_nothing_and_asks_nothing_twice() {
    killed(120, 1, 1);
}

#[test]
fn killed_between_votes_it_keeps_those_that_were_given() {
    killed(60, 3, 2);
}

#[test]
fn a_torn_last_line_is_repaired() {
    let server = Server::start(|asked| Response::uncertainty(percent(asked.sample)));
    let whole = |i: usize| {
        let line = line(i);
        let own = line.strip_suffix(" }").unwrap();
        format!("{own},\"uncertainty\":0.5,\"votes\":[0.5],\"spread\":0.0,\"model\":\"stronger\"}}")
    };
    let torn = whole(1);
    let inside_a_letter = torn.find('é').unwrap() + 1;
    for cut in [1, 9, inside_a_letter, torn.len() - 1] {
        let job = Job::new(3);
        let left = [whole(0).as_bytes(), b"\n", &torn.as_bytes()[..cut]].concat();
        fs::write(job.path("out.jsonl"), left).unwrap();
        let before = server.asked().len();
        job.run(&server, &[]).expect(0);
        let asked: BTreeSet<usize> = server.asked()[before..].iter().map(|a| a.sample).collect();
        assert_eq!(asked, BTreeSet::from([1, 2]), "cut at {cut}");
        assert_eq!(job.scored().len(), 3);
    }
    // A line that the disk knows in part, after a power failure.
    let job = Job::new(2);
    fs::write(
        job.path("out.jsonl"),
        [&torn.as_bytes()[..20], &[0; 30]].concat(),
    )
    .unwrap();
    job.run(&server, &[]).expect(0);
    assert_eq!(job.scored().len(), 2);
    // The line break alone is missing: the answer is there.
    let job = Job::new(2);
    fs::write(job.path("out.jsonl"), format!("{}\n{torn}", whole(0))).unwrap();
    let before = server.asked().len();
    job.run(&server, &[]).expect(0);
    assert_eq!(server.asked().len(), before);
    assert_eq!(job.out(), format!("{}\n{torn}\n", whole(0)));

    // What is no work of this program is left as it is.
    for notes in [
        "my notes",
        "{a: 1}",
        "{ \"id\": \"other\"",
        "{\"a\": 1}\n{\"b\"",
    ] {
        let job = Job::new(2);
        fs::write(job.path("out.jsonl"), notes).unwrap();
        job.run(&server, &[]).expect(1);
        assert_eq!(job.out(), notes);
    }
}

#[test]
fn two_processes_do_not_share_an_output() {
    let server = Server::start(|_| Response::uncertainty(1).after(400));
    let job = Job::new(2);
    let first = job
        .remote(&server, &["--concurrency", "1"])
        .spawn()
        .unwrap();
    while server.asked().is_empty() {
        thread::sleep(Duration::from_millis(2));
    }
    let second = job.run(&server, &[]).expect(1);
    assert!(
        second
            .stderr
            .contains("another process is writing this file"),
        "{}",
        second.stderr
    );
    Run::of(first.wait_with_output().unwrap()).expect(0);
    assert_eq!(server.asked().len(), 2);
}

#[test]
fn an_output_of_another_job_is_refused() {
    let server = Server::start(|_| Response::uncertainty(1));
    let job = Job::new(2);
    job.run(&server, &[]).expect(0);
    let run = job.run(&server, &["--model", "other"]).expect(1);
    assert!(
        run.stderr.contains("scored by stronger, and now by other"),
        "{}",
        run.stderr
    );
    let run = job.run(&server, &["--votes", "2"]).expect(1);
    assert!(
        run.stderr
            .contains("scored with 1 votes a sample, and now with 2"),
        "{}",
        run.stderr
    );

    fs::write(
        job.path("in.jsonl"),
        line(0) + "\n" + &line(1).replace('é', "e"),
    )
    .unwrap();
    let run = job.run(&server, &[]).expect(1);
    assert!(run.stderr.contains("another text"), "{}", run.stderr);
    fs::write(job.path("in.jsonl"), line(0)).unwrap();
    let run = job.run(&server, &[]).expect(1);
    assert!(run.stderr.contains("s1 is not in --data"), "{}", run.stderr);
    assert_eq!(server.asked().len(), 2);
}
