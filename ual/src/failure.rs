//! What the program says when it fails.

use anyhow::Error;

/// The message and its causes, and after them the stack's frames, where RUST_BACKTRACE asks for some: candle's errors have
/// theirs in the text.
pub fn text(error: &Error) -> String {
    let mut frames = Vec::new();
    let mut messages = error.chain().map(|cause| {
        let text = cause.to_string();
        let (message, of_cause) = parted(&text);
        frames.extend(of_cause);
        message
    });
    let mut all = format!("Error: {}", messages.next().unwrap_or_default());
    let causes: Vec<String> = messages.collect();
    for (i, cause) in causes.iter().enumerate() {
        if i == 0 {
            all += "\n\nCaused by:";
        }
        let number = match causes.len() {
            1 => String::new(),
            _ => format!("{i}: "),
        };
        all += &format!("\n    {number}{}", cause.replace('\n', "\n    "));
    }
    frames.extend(parted(&error.backtrace().to_string()).1); // none where nothing asked for them
    for (i, frames) in frames.iter().enumerate() {
        let title = if i == 0 { "\n\nStack backtrace:" } else { "" };
        all += &format!("{title}\n{frames}");
    }
    all
}

/// A text before its first frame, and from there on.
fn parted(text: &str) -> (String, Option<String>) {
    let is_frame = |line: &str| line.trim_start().starts_with("0: ") && line.starts_with(' ');
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        if is_frame(line) {
            let (message, frames) = text.split_at(start);
            return (
                message.trim_end().to_string(),
                Some(frames.trim_end().to_string()),
            );
        }
        start += line.len();
    }
    (text.trim_end().to_string(), None)
}
