//! Parquet files, as data sets are published: a row is an object.

use std::path::Path;

use anyhow::{Context, Result};
use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row},
};
use serde_json::json;

/// How such a file begins.
pub const MAGIC: &[u8] = b"PAR1";

/// Gives `take` the number of each row, from 1, and its columns as a JSON object. `path` is for messages.
pub fn each_row(
    path: &Path,
    bytes: Vec<u8>,
    take: &mut impl FnMut(usize, &str) -> Result<()>,
) -> Result<()> {
    let name = path.display();
    let unreadable =
        || format!("{name}: it begins as a Parquet file does, and cannot be read as one");
    let reader = SerializedFileReader::new(Bytes::from(bytes)).with_context(unreadable)?;
    for (row, number) in reader.get_row_iter(None).with_context(unreadable)?.zip(1..) {
        let row = row.with_context(|| format!("{name}: row {number} of this Parquet file"))?;
        take(number, &object(&row))?;
    }
    Ok(())
}

/// The text, not a value: that keeps the order of the columns.
fn object(row: &Row) -> String {
    let columns = row
        .get_column_iter()
        .map(|(name, field)| format!("{}:{}", json!(name), value(field)));
    format!("{{{}}}", columns.collect::<Vec<_>>().join(","))
}

fn value(field: &Field) -> String {
    match field {
        Field::Null => "null".to_string(),
        Field::Bool(_)
        | Field::Byte(_)
        | Field::Short(_)
        | Field::Int(_)
        | Field::Long(_)
        | Field::UByte(_)
        | Field::UShort(_)
        | Field::UInt(_)
        | Field::ULong(_) => field.to_string(),
        Field::Float16(number) => number_or_null(number.to_f32()),
        Field::Float(number) => number_or_null(*number),
        Field::Double(number) => json!(number).to_string(),
        Field::Str(text) => json!(text).to_string(),
        // Text that the writer did not mark as such, or else bytes, which no one takes for text.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => json!(text).to_string(),
            Err(_) => json!({"base64": BASE64_STANDARD.encode(bytes.data())}).to_string(),
        },
        Field::Group(row) => object(row),
        Field::ListInternal(list) => {
            let elements = list.elements().iter().map(value);
            format!("[{}]", elements.collect::<Vec<_>>().join(","))
        }
        Field::MapInternal(map) => {
            let entries = map.entries().iter().map(|(key, field)| {
                let key = match key {
                    Field::Str(text) => text.clone(),
                    other => other.to_string(),
                };
                format!("{}:{}", json!(key), value(field))
            });
            format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
        }
        Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => json!(field.to_string()).to_string(),
    }
}

/// In the digits of an f32, where there are any: JSON has no NaN.
fn number_or_null(number: f32) -> String {
    match number.is_finite() {
        true => number.to_string(),
        false => "null".to_string(),
    }
}
