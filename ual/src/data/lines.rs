//! Files with a JSON object a line.

use std::{fs, path::Path};

use anyhow::{Context, Result, anyhow};
use serde::de::DeserializeOwned;

/// What `parse` makes of each line that is not blank, given its number, from 1. An error names the line.
pub fn read<T>(path: &Path, mut parse: impl FnMut(&str, usize) -> Result<T>) -> Result<Vec<T>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut all = Vec::new();
    for (line, number) in bytes.split(|&byte| byte == b'\n').zip(1..) {
        let line = std::str::from_utf8(line)
            .map_err(|e| anyhow!("not UTF-8 from byte {}", e.valid_up_to() + 1));
        let parsed = line.and_then(|line| match line.trim() {
            "" => Ok(None),
            _ => parse(line, number).map(Some),
        });
        all.extend(parsed.map_err(|e| anyhow!("{}:{number}: {e:#}", path.display()))?);
    }
    Ok(all)
}

/// A line's object. An error has the column.
pub fn object<T: DeserializeOwned>(line: &str) -> Result<T> {
    serde_json::from_str(line).map_err(|e| {
        // serde_json counts lines inside the one it was given.
        let message = e.to_string();
        let message = message.split(" at line ").next().unwrap_or(&message);
        anyhow!("{message} (column {})", e.column())
    })
}
