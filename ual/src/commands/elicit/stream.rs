//! Event streams, which some servers send whether or not they are asked to.

use serde_json::{Value, json};

use crate::commands::elicit::client::text;

/// Whether a body is an event stream.
pub fn is_stream(body: &str) -> bool {
    let body = body.trim_start();
    ["data:", "event:", "id:", ":"]
        .iter()
        .any(|field| body.starts_with(field))
}

/// The answer that a stream's events come to, as a server that does not stream gives it; or the error that one of them is.
pub fn gather(stream: &str) -> Result<Value, String> {
    let (mut content, mut reasoning) = (String::new(), String::new());
    let (mut reason, mut usage) = (Value::Null, Value::Null);
    let mut ended = false;
    for data in stream.lines().filter_map(|line| line.strip_prefix("data:")) {
        if data.trim() == "[DONE]" {
            ended = true;
            break;
        }
        let event: Value = serde_json::from_str(data)
            .map_err(|error| format!("an event of its stream is no JSON, {error}"))?;
        if !event["error"].is_null() {
            return Ok(event);
        }
        // Counts are of all so far.
        if event["usage"].is_object() {
            usage = event["usage"].clone();
        }
        let choices = event["choices"].as_array().into_iter().flatten();
        for choice in choices.filter(|choice| choice["index"].as_u64().unwrap_or(0) == 0) {
            let delta = &choice["delta"];
            content += &text(&delta["content"]);
            reasoning += &text(&delta["reasoning_content"]);
            reasoning += &text(&delta["reasoning"]);
            if !choice["finish_reason"].is_null() {
                reason = choice["finish_reason"].clone();
                ended = true;
            }
        }
    }
    if !ended {
        return Err("its stream ends before the answer does".into());
    }
    Ok(json!({
        "choices": [{
            "message": {"content": content, "reasoning_content": reasoning},
            "finish_reason": reason,
        }],
        "usage": usage,
    }))
}
