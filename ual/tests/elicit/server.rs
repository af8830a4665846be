//! A chat endpoint that behaves as a test tells it.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// A request as the server sees it.
#[derive(Clone)]
pub struct Asked {
    /// Its number in "question N?", else 0.
    pub sample: usize,
    /// How often this sample was asked before.
    pub before: usize,
    pub at: Instant,
    pub text: String,
    pub body: Value,
    /// Path and query.
    pub target: String,
    /// By names in lower case.
    pub headers: BTreeMap<String, String>,
}

impl Asked {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

pub struct Response {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    delay: Duration,
}

impl Response {
    pub fn new(status: u16, body: Value) -> Self {
        Self::bytes(status, body.to_string())
    }

    pub fn bytes(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
            delay: Duration::ZERO,
        }
    }

    pub fn error(status: u16, message: &str) -> Self {
        Self::new(status, json!({"error": {"message": message}}))
    }

    pub fn says(text: &str) -> Self {
        Self::new(
            200,
            json!({
                "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3},
            }),
        )
    }

    pub fn uncertainty(percent: usize) -> Self {
        Self::says(&format!("Uncertainty: {percent}"))
    }

    pub fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }

    pub fn after(mut self, milliseconds: u64) -> Self {
        self.delay = Duration::from_millis(milliseconds);
        self
    }
}

/// An HTTP server that answers by a function and remembers what it was asked. Its threads end with the test's process.
pub struct Server {
    pub url: String,
    log: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    pub fn start(answer: impl Fn(&Asked) -> Response + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let log: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (shared, answer) = (log.clone(), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (shared.clone(), answer.clone());
                // A client that was killed leaves a connection that ends early: no failure of the test's.
                thread::spawn(move || _ = serve(stream, &log, &*answer));
            }
        });
        Self { url, log }
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }
}

fn serve(
    stream: TcpStream,
    log: &Mutex<Vec<Asked>>,
    answer: &dyn Fn(&Asked) -> Response,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if line.is_empty() {
        return Ok(());
    }
    let target = line
        .strip_prefix("POST ")
        .and_then(|rest| rest.trim_end().strip_suffix(" HTTP/1.1"))
        .unwrap_or_else(|| panic!("{line}"))
        .to_string();
    assert!(target.contains("/chat/completions"), "{target}");
    let mut headers = BTreeMap::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            None => break,
            Some((name, value)) => headers.insert(name.to_lowercase(), value.to_string()),
        };
    }
    let length = headers["content-length"].parse().unwrap();
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let body: Value = serde_json::from_slice(&body).unwrap();
    let text = body["messages"][0]["content"].as_str().unwrap().to_string();
    let name = text.split("question ").nth(1);
    let name = name.and_then(|rest| rest.split('?').next()?.parse().ok());
    let mut asked = Asked {
        sample: name.unwrap_or_default(),
        before: 0,
        at: Instant::now(),
        text,
        body,
        target,
        headers,
    };
    {
        let mut log = log.lock().unwrap();
        asked.before = log
            .iter()
            .filter(|other| other.sample == asked.sample)
            .count();
        log.push(asked.clone());
    }
    let response = answer(&asked);
    thread::sleep(response.delay);
    let mut head = format!(
        "HTTP/1.1 {} X\r\ncontent-length: {}\r\n",
        response.status,
        response.body.len()
    );
    for (name, value) in &response.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "connection: close\r\n\r\n";
    // In one piece, so that nothing waits for an acknowledgement.
    (&stream).write_all(&[head.as_bytes(), &response.body].concat())
}
