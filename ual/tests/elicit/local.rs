//! Scores of a local model.

use std::fs;

use crate::{
    job::{Job, Run},
    model::{expected_uncertainty, write_model},
};

#[test]
fn a_local_model_scores_by_the_entropy_of_its_predictions() {
    let job = Job::new(3);
    let model = job.path("small.gguf");
    let weights = write_model(&model);
    let long = format!(
        "{{\"id\": \"long\", \"prompt\": \"question 9?\", \"response\": \"{}\"}}\n",
        "a".repeat(64)
    );
    let lines = fs::read_to_string(job.path("in.jsonl")).unwrap();
    fs::write(job.path("in.jsonl"), format!("{long}{lines}")).unwrap();
    let run = Run::of(job.command(&["--local", "small.gguf"]).output().unwrap()).expect(3);
    assert!(
        run.stderr.contains("long: it has 9") && run.stderr.contains("the model takes 64"),
        "{}",
        run.stderr
    );
    let scored = job.scored();
    assert_eq!(scored.len(), 3);
    for i in 0..3 {
        let line = &scored[&format!("s{i}")];
        let (found, expected) = (
            line["uncertainty"].as_f64().unwrap(),
            expected_uncertainty(&weights, i),
        );
        assert!((found - expected).abs() < 1e-6, "{found} and {expected}");
        assert!(expected > 0.1 && expected < 0.999, "{expected}");
        let name = line["model"].as_str().unwrap();
        let hash = name.strip_prefix("small.gguf sha256:").unwrap();
        assert!(hash.len() == 16 && hash.chars().all(|c| c.is_ascii_hexdigit()));
        assert!(line.get("votes").is_none() && line.get("spread").is_none());
    }

    // Continues, and does the same samples to the same digits.
    let all = job.out();
    let cut = all.find('\n').unwrap() + 20;
    fs::write(job.path("out.jsonl"), &all[..cut]).unwrap();
    fs::write(job.path("in.jsonl"), lines).unwrap();
    Run::of(job.command(&["--local", "small.gguf"]).output().unwrap()).expect(0);
    assert_eq!(job.out(), all);

    // Another model of the same name is another model.
    let mut bytes = fs::read(&model).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&model, bytes).unwrap();
    let run = Run::of(job.command(&["--local", "small.gguf"]).output().unwrap()).expect(1);
    assert!(
        run.stderr.contains("choose another --out"),
        "{}",
        run.stderr
    );
}
