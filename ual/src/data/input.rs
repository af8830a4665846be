//! The one reader of data sets, for every command: JSON lines, a JSON array or Parquet; the former plain or gzipped.

use std::{fs, io::Read, path::Path};

use anyhow::{Context, Result, anyhow, bail};
use flate2::read::MultiGzDecoder;
use serde::de::IgnoredAny;
use serde_json::{Deserializer, Map, Value};

use crate::{
    data::{
        form::{self, Form, Turn},
        lines, parquet,
    },
    files::refuse_pointer,
};

const GZIP: &[u8] = &[0x1f, 0x8b];

/// A sample as it stands in a file.
pub struct Record {
    /// Where it begins, from 1; of Parquet the row.
    pub line: usize,
    /// The JSON object on one line: its text in the file, less line breaks.
    pub object: String,
    pub fields: Map<String, Value>,
    /// What it says, by the form of its fields.
    pub turns: Vec<Turn>,
}

/// What `parse` makes of each sample. An error names its line. The form of the samples is said on stderr.
pub fn read<T>(path: &Path, mut parse: impl FnMut(Record) -> Result<T>) -> Result<Vec<T>> {
    let name = path.display();
    let bytes = fs::read(path).with_context(|| format!("cannot read {name}"))?;
    let bytes = decompressed(bytes).with_context(|| format!("{name}: cannot be decompressed"))?;
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    refuse_what_is_no_json(text).with_context(|| name.to_string())?;
    let mut all = Vec::new();
    let mut known: Option<Form> = None;
    let mut take = |line: usize, object: &str| {
        let parsed = lines::object(object).and_then(|fields| {
            let (form, turns) = form::turns(&fields, known)?;
            known = Some(form);
            parse(Record {
                line,
                object: on_one_line(object),
                fields,
                turns,
            })
        });
        all.push(parsed.map_err(|e| anyhow!("{name}:{line}: {e:#}"))?);
        Ok(())
    };
    match text.trim_ascii_start().first() {
        _ if text.starts_with(parquet::MAGIC) => {
            parquet::each_row(path, bytes, &mut take)?;
        }
        Some(b'[') => each_of_array(path, text, &mut take)?,
        _ => each_line(path, text, &mut take)?,
    }
    if let Some(form) = known {
        eprintln!("{name}: {} samples, {form}", all.len());
    }
    Ok(all)
}

fn decompressed(bytes: Vec<u8>) -> Result<Vec<u8>> {
    if !bytes.starts_with(GZIP) {
        return Ok(bytes);
    }
    let mut all = Vec::new();
    MultiGzDecoder::new(&bytes[..]).read_to_end(&mut all)?;
    Ok(all)
}

fn refuse_what_is_no_json(text: &[u8]) -> Result<()> {
    if text.starts_with(b"\xff\xfe") || text.starts_with(b"\xfe\xff") {
        bail!("it is UTF-16; save it as UTF-8");
    }
    refuse_pointer(text)
}

fn each_line(
    path: &Path,
    text: &[u8],
    take: &mut impl FnMut(usize, &str) -> Result<()>,
) -> Result<()> {
    for (line, number) in text.split(|&byte| byte == b'\n').zip(1..) {
        let line = utf8(line).map_err(|e| anyhow!("{}:{number}: {e}", path.display()))?;
        if !line.trim().is_empty() {
            take(number, line.trim())?;
        }
    }
    Ok(())
}

fn each_of_array(
    path: &Path,
    text: &[u8],
    take: &mut impl FnMut(usize, &str) -> Result<()>,
) -> Result<()> {
    let text = utf8(text).with_context(|| path.display().to_string())?;
    let mut cursor = Cursor {
        rest: text,
        line: 1,
    };
    let bad = |line: usize, what: &str| anyhow!("{}:{line}: {what}", path.display());
    cursor.skip(0);
    cursor.skip(1); // the bracket
    let mut more = !cursor.rest.starts_with(']');
    if !more {
        cursor.skip(1);
    }
    while more {
        let mut values = Deserializer::from_str(cursor.rest).into_iter::<IgnoredAny>();
        match values.next() {
            Some(Ok(_)) => (),
            Some(Err(e)) => return Err(bad(cursor.line + e.line() - 1, &e.to_string())),
            None => return Err(bad(cursor.line, "the array does not end")),
        }
        let length = values.byte_offset();
        take(cursor.line, &cursor.rest[..length])?;
        cursor.skip(length);
        more = cursor.rest.starts_with(',');
        if !more && !cursor.rest.starts_with(']') {
            return Err(bad(
                cursor.line,
                "a comma or the end of the array is missing",
            ));
        }
        cursor.skip(1);
    }
    match cursor.rest {
        "" => Ok(()),
        _ => Err(bad(cursor.line, "something follows the array")),
    }
}

/// What is left of a text, and the line on which that begins.
struct Cursor<'a> {
    rest: &'a str,
    line: usize,
}

impl Cursor<'_> {
    /// Past so many bytes, and blanks after them.
    fn skip(&mut self, bytes: usize) {
        let after = self.rest[bytes..].trim_start();
        let passed = &self.rest[..self.rest.len() - after.len()];
        self.line += passed.bytes().filter(|&byte| byte == b'\n').count();
        self.rest = after;
    }
}

fn utf8(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|e| anyhow!("not UTF-8 from byte {}", e.valid_up_to() + 1))
}

/// No string of JSON holds a line break, so those there are stand between its parts, and so do blanks after them.
fn on_one_line(json: &str) -> String {
    let mut lines = json.split(['\n', '\r']);
    let first = lines.next().unwrap_or_default().to_string();
    lines.fold(first, |all, line| all + line.trim())
}
