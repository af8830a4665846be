//! Tables in Markdown.

use std::{borrow::Borrow, fmt::Write as _};

fn row(text: &mut String, cells: &[impl Borrow<str>]) {
    writeln!(text, "| {} |", cells.join(" | ")).expect("a string grows");
}

/// With an empty line after it.
pub fn table(text: &mut String, header: &[impl Borrow<str>], rows: &[Vec<String>]) {
    row(text, header);
    text.push_str(&format!("|{}\n", "---|".repeat(header.len())));
    rows.iter().for_each(|cells| row(text, cells));
    text.push('\n');
}
