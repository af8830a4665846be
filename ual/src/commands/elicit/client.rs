//! One request to an OpenAI-compatible chat endpoint, and what its outcome means.

use std::{io::ErrorKind, net::ToSocketAddrs, time::Duration};

use anyhow::{Result, anyhow};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use ureq::http::{HeaderMap, StatusCode, Uri};

use crate::commands::elicit::{
    limits::{exhausted, retry_after},
    samples::Cost,
    secrets::Secrets,
    stream,
};

const COMPLETIONS: &str = "/chat/completions";
/// Bytes of an answer that are read; an answer is a line or a few paragraphs.
const LARGEST: u64 = 16 << 20;
/// Time to reach the server; a model's answer takes longer.
const CONNECT: Duration = Duration::from_secs(15);
/// Why an answer ends that says all it was to say.
const WHOLE: [&str; 6] = ["stop", "stop_sequence", "end_turn", "eos", "eos_token", ""];
/// How compressed data begins.
const GZIP: [u8; 2] = [0x1f, 0x8b];
/// Characters of a server's message that are shown.
const SHOWN: usize = 300;

pub struct Client {
    agent: ureq::Agent,
    url: String,
    /// To be masked in all that is shown.
    pub secrets: Secrets,
    /// Through which requests go, without its login.
    proxy: Option<String>,
    /// Name and value of the header with the key.
    key: Option<(String, String)>,
    body: Map<String, Value>,
}

pub struct Reply {
    /// What the model said, or why that is nothing, or is not to be used: of an answer that was cut short a number's end
    /// may be missing.
    pub text: Result<String, String>,
    pub cost: Cost,
    /// Wait before any further request, where a limit is used up.
    pub wait: Option<Duration>,
}

/// Why a request has no reply.
pub enum Failure {
    /// No request can succeed: the key, the address, the model.
    Fatal(anyhow::Error),
    /// The server will not answer this one.
    Refused(String),
    /// It may succeed later.
    Passing {
        reason: String,
        /// As the server asks.
        wait: Option<Duration>,
        kind: Passing,
    },
}

#[derive(Clone, Copy, PartialEq)]
pub enum Passing {
    /// A limit on requests, which holds for all of them.
    Limit,
    /// There is no server, or not the right one.
    Unreachable,
    /// An error of the server, a connection cut, no answer in time.
    Error,
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Value,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
    finish_reason: Option<String>,
}

/// Texts are strings or lists of parts.
#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Value,
    /// What a model thought before it answered, by either name.
    #[serde(default)]
    reasoning_content: Value,
    #[serde(default)]
    reasoning: Value,
}

/// Where a chat is completed; a query, as Azure wants one, stays at the end.
fn endpoint(base_url: &str) -> String {
    let (path, query) = match base_url.split_once('?') {
        Some((path, query)) => (path, format!("?{query}")),
        None => (base_url, String::new()),
    };
    let path = path.trim_end_matches('/');
    let path = path.strip_suffix(COMPLETIONS).unwrap_or(path);
    format!("{path}{COMPLETIONS}{query}")
}

/// The proxy of requests to `url`, if there is one.
fn proxy(url: &str) -> Option<String> {
    let proxy = ureq::Proxy::try_from_env()?;
    let scheme = proxy.uri().scheme_str().unwrap_or("http");
    let passed_by = url.parse().is_ok_and(|url| proxy.is_no_proxy(&url));
    (!passed_by).then(|| format!("{scheme}://{}:{}", proxy.host(), proxy.port()))
}

/// The host of an address, if no network address belongs to it.
fn unknown_host(url: &str) -> Option<String> {
    let url: Uri = url.parse().ok()?;
    let host = url.host()?;
    // Any port: names are looked up alike.
    (host.trim_matches(['[', ']']), 80)
        .to_socket_addrs()
        .is_err()
        .then(|| host.to_string())
}

/// The header in which a server looks for the key: Azure has one of its own.
pub fn key_header(base_url: &str) -> &'static str {
    let (path, query) = base_url.split_once('?').unwrap_or((base_url, ""));
    let host = path.split('/').nth(2).unwrap_or_default();
    if host.contains(".azure.") || query.contains("api-version=") {
        "api-key"
    } else {
        "authorization"
    }
}

/// What the header with the key says.
pub fn header_value(name: &str, key: &str) -> String {
    if name.eq_ignore_ascii_case("authorization") {
        format!("Bearer {key}")
    } else {
        key.to_string()
    }
}

impl Client {
    /// `body` has further fields of every request.
    pub fn new(
        base_url: &str,
        key: Option<&str>,
        key_header: &str,
        model: &str,
        mut body: Map<String, Value>,
        timeout: Duration,
        concurrency: usize,
    ) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(timeout))
            .timeout_connect(Some(CONNECT.min(timeout)))
            .accept_encoding("identity")
            // ureq would repeat the request as a GET.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections(concurrency)
            .max_idle_connections_per_host(concurrency)
            .build()
            .new_agent();
        body.insert("model".into(), model.into());
        Self {
            agent,
            secrets: Secrets::new(key, base_url),
            proxy: proxy(&endpoint(base_url)),
            url: endpoint(base_url),
            key: key.map(|key| (key_header.to_string(), header_value(key_header, key))),
            body,
        }
    }

    pub fn ask(&self, prompt: &str) -> Result<Reply, Failure> {
        let mut body = self.body.clone();
        body.insert(
            "messages".into(),
            json!([{"role": "user", "content": prompt}]),
        );
        let mut request = self.agent.post(&self.url);
        if let Some((name, value)) = &self.key {
            request = request.header(name, value);
        }
        let mut response = request.send_json(&body).map_err(|e| self.no_response(e))?;
        let bytes = response
            .body_mut()
            .with_config()
            .limit(LARGEST)
            .read_to_vec();
        let headers = response.headers();
        match (response.status(), bytes) {
            (StatusCode::OK, bytes) => {
                let bytes = bytes.map_err(|e| self.broken_off(&e))?;
                self.reply(&decode(headers, &bytes), headers)
            }
            // The status says enough where the text is not to be had.
            (status, bytes) => {
                let text = decode(headers, &bytes.unwrap_or_default());
                Err(self.failure(status, headers, &text.unwrap_or_else(|why| why)))
            }
        }
    }

    /// While an answer was read: there is a server.
    fn broken_off(&self, error: &ureq::Error) -> Failure {
        Failure::Passing {
            reason: self.secrets.hide(&format!("{}: {error}", self.url)),
            wait: None,
            kind: Passing::Error,
        }
    }

    fn no_response(&self, error: ureq::Error) -> Failure {
        use ureq::Error::{
            BadUri, ConnectProxyFailed, ConnectionFailed, HostNotFound, Http, InvalidProxyUrl, Io,
            RedirectFailed, Rustls, Timeout, Tls, TlsRequired, TooManyRedirects,
        };
        let mut reason = format!("{}: {error}", self.url);
        let mut lost = false;
        if let HostNotFound | Io(_) = &error {
            let host = self.proxy.as_ref().unwrap_or(&self.url);
            if let Some(name) = unknown_host(host) {
                lost = true;
                reason = format!("{}: there is no host {name}: {error}", self.url);
            }
        }
        if let Some(proxy) = &self.proxy {
            reason +=
                &format!(", through the proxy {proxy} (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY)");
        }
        // How rustls says that what came is no TLS.
        if self.url.starts_with("https://") && reason.contains("corrupt message") {
            reason += "; no TLS is spoken there, so the address may have to start with http://";
        }
        let reason = self.secrets.hide(&reason);
        let kind = match &error {
            _ if lost => Passing::Unreachable,
            BadUri(_) | Http(_) | InvalidProxyUrl | RedirectFailed | Rustls(_) | Tls(_)
            | TlsRequired | TooManyRedirects => {
                return Failure::Fatal(anyhow!(reason));
            }
            ConnectionFailed
            | ConnectProxyFailed(_)
            | HostNotFound
            | Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => Passing::Unreachable,
            // Invalid data: no TLS at the other end, or a certificate that does not hold.
            Io(e) if [ErrorKind::ConnectionRefused, ErrorKind::InvalidData].contains(&e.kind()) => {
                Passing::Unreachable
            }
            _ => Passing::Error,
        };
        Failure::Passing {
            reason,
            wait: None,
            kind,
        }
    }

    fn failure(&self, status: StatusCode, headers: &HeaderMap, text: &str) -> Failure {
        let error = serde_json::from_str::<Value>(text)
            .ok()
            .and_then(|value| value.get("error").cloned())
            .unwrap_or_default();
        let field = |name| error.get(name).and_then(Value::as_str);
        let message = field("message").or(error.as_str()).unwrap_or(text);
        let message = self.start(message);
        let mut reason = format!("{status}: {}", message.trim());
        if status.is_redirection() {
            let target = headers
                .get("location")
                .map(|to| String::from_utf8_lossy(to.as_bytes()));
            let target = target.unwrap_or("nowhere".into());
            let target = target.replacen(COMPLETIONS, "", 1);
            let target = Secrets::new(None, &target).hide(&self.secrets.hide(&target));
            reason = format!("{status}: the server redirects to {target}; give that as --base-url");
        }
        if status.is_client_error()
            && message.contains("stream")
            && !self.body.contains_key("stream")
        {
            reason += " (a server that only streams wants --body '{\"stream\": true}')";
        }
        // Servers differ in the status of an unknown model, and some say "too many requests" when the money is spent.
        let code = field("code").or(field("type"));
        let hopeless = code
            .is_some_and(|code| ["model_not_found", "insufficient_quota"].contains(&code))
            || field("param") == Some("model");
        let wait = retry_after(headers);
        let passing = |kind| Failure::Passing {
            reason: reason.clone(),
            wait,
            kind,
        };
        match status.as_u16() {
            _ if hopeless => self.fatal(&reason),
            429 => passing(Passing::Limit),
            503 if wait.is_some() => passing(Passing::Limit),
            408 | 409 | 425 | 500.. => passing(Passing::Error),
            400 | 403 | 406 | 410.. => Failure::Refused(reason),
            _ => self.fatal(&reason),
        }
    }

    fn fatal(&self, reason: &str) -> Failure {
        let url = self.secrets.hide(&self.url);
        Failure::Fatal(anyhow!("{url}: {reason}"))
    }

    /// As much of a server's text as is shown.
    fn start(&self, text: &str) -> String {
        self.secrets.hide(text).chars().take(SHOWN).collect()
    }

    /// Of an answer with status 200.
    fn reply(&self, text: &Result<String, String>, headers: &HeaderMap) -> Result<Reply, Failure> {
        let text = match text {
            Ok(text) => text,
            Err(why) => {
                return Ok(Reply {
                    text: Err(self.secrets.hide(why)),
                    cost: Cost::default(),
                    wait: exhausted(headers),
                });
            }
        };
        // Some services put the failure of the one behind them into an answer that is good otherwise.
        let value = if stream::is_stream(text) {
            stream::gather(text)
        } else {
            serde_json::from_str(text).map_err(|error| error.to_string())
        };
        let error = value.as_ref().map_or(&Value::Null, |value| &value["error"]);
        if !error.is_null() {
            let code = error["code"].as_u64();
            let code = code.and_then(|code| u16::try_from(code).ok());
            let code = code.filter(|code| (400..600).contains(code));
            let status = code.and_then(|code| StatusCode::from_u16(code).ok());
            let status = status.unwrap_or(StatusCode::BAD_GATEWAY);
            return Err(self.failure(status, headers, &json!({ "error": error }).to_string()));
        }
        let completion =
            value.and_then(|value| serde_json::from_value(value).map_err(|e| e.to_string()));
        let (said, usage) = match completion {
            Ok(Completion { choices, usage }) => {
                let choice = choices.into_iter().next();
                (choice.ok_or("no choices".into()).and_then(said), usage)
            }
            Err(error) => (Err(error), Value::Null),
        };
        Ok(Reply {
            text: said
                .map_err(|why| format!("{}: {:?}", self.secrets.hide(&why), self.start(text))),
            cost: Cost {
                prompt_tokens: usage["prompt_tokens"].as_u64().unwrap_or(0),
                completion_tokens: usage["completion_tokens"].as_u64().unwrap_or(0),
            },
            wait: exhausted(headers),
        })
    }
}

/// The text of a body, or why there is none. A byte that is no UTF-8 spoils one character, not the answer.
fn decode(headers: &HeaderMap, bytes: &[u8]) -> Result<String, String> {
    let encoding = headers
        .get("content-encoding")
        .map(|value| String::from_utf8_lossy(value.as_bytes()).trim().to_string())
        .filter(|name| !name.is_empty() && !name.eq_ignore_ascii_case("identity"))
        .or_else(|| bytes.starts_with(&GZIP).then(|| "gzip".into()));
    if let Some(name) = encoding {
        return Err(format!(
            "its content encoding is {name:?}, which was not asked for"
        ));
    }
    let text = String::from_utf8_lossy(bytes);
    Ok(text.trim_start_matches('\u{feff}').to_string())
}

fn said(choice: Choice) -> Result<String, String> {
    let message = choice.message;
    let content = text(&message.content);
    let reasoning = text(&message.reasoning_content) + &text(&message.reasoning);
    let only_reasoned = content.trim().is_empty() && !reasoning.trim().is_empty();
    // Some say STOP.
    let reason = choice.finish_reason.unwrap_or_default().to_lowercase();
    if !WHOLE.contains(&reason.as_str()) {
        let within = if only_reasoned {
            " within the model's reasoning: it needs more tokens (--body), or less to reason"
        } else {
            ""
        };
        return Err(format!(
            "the answer ended for the reason {reason:?}{within}"
        ));
    }
    if only_reasoned {
        // The server took all that the model said for reasoning; its end is the answer's.
        return Ok(reasoning);
    }
    if message.content.is_null() {
        return Err("no content".into());
    }
    Ok(content)
}

/// Of a string, or of a list of parts those that are text.
pub fn text(content: &Value) -> String {
    let part = |part: &Value| match (part, part["type"].as_str()) {
        (Value::String(text), _) => text.clone(),
        (_, None | Some("text" | "output_text")) => {
            part["text"].as_str().unwrap_or_default().to_string()
        }
        _ => String::new(),
    };
    match content {
        Value::Array(parts) => parts.iter().map(part).collect(),
        other => other.as_str().unwrap_or_default().to_string(),
    }
}
