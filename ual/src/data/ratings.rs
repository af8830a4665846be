//! Sentences that many people have rated from −4, extremely negative, to 4: the data of Hutto & Gilbert (ICWSM 2014), which
//! the source distribution of vaderSentiment 3.3.2 has, MIT licence.
//!
//! Of each kind of sentences there are two tables: id, mean rating and sentence; id, mean, deviation and all ratings.

use std::{
    collections::{HashMap, HashSet},
    io::Read,
};

use anyhow::{Context, Result, ensure};
use flate2::read::GzDecoder;
use tar::Archive;

/// SHA-256 of the archive.
pub const DIGEST: &str = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9";

/// The archive within the archive.
const PACKED: &str = "hutto_ICWSM_2014.tar.gz";

/// Kinds of sentences, and how the names of their tables begin.
pub const KINDS: [(&str, &str); 4] = [
    ("tweet", "tweets"),
    ("film", "movieReviewSnippets"),
    ("product", "amazonReviewSnippets"),
    ("editorial", "nytEditorialSnippets"),
];

/// Between the mean that is stated, which has at least nine digits, and that of the ratings.
const TOLERANCE: f64 = 1e-6;

#[derive(Clone, Debug, PartialEq)]
pub struct Sentence {
    /// Unique among all kinds.
    pub id: String,
    /// One of [`KINDS`].
    pub kind: &'static str,
    pub text: String,
    /// In [−4, 4], at least two.
    pub ratings: Vec<i8>,
}

pub struct Sentences {
    pub sentences: Vec<Sentence>,
    /// How many were left out because the mean beside the sentence is not that of its ratings: they are of another round
    /// of ratings. In the real archive all of them are tweets, variants that differ from one another in a word or a mark.
    pub contradicted: usize,
    /// How many were left out because an earlier one differs from them in case and blanks alone.
    pub repeated: usize,
}

/// The sentences of the source distribution, a gzipped tar archive, in its order.
pub fn read(archive: &[u8]) -> Result<Sentences> {
    let outer = unpacked(archive)?;
    let inner = outer
        .get(PACKED)
        .with_context(|| format!("it has no {PACKED}"))?;
    let files = unpacked(inner).context(PACKED)?;
    let mut all = Sentences {
        sentences: Vec::new(),
        contradicted: 0,
        repeated: 0,
    };
    let mut seen = HashSet::new();
    for (kind, beginning) in KINDS {
        let names = ["GroundTruth", "anonDataRatings"].map(|end| format!("{beginning}_{end}.txt"));
        let mut ratings = HashMap::new();
        for (number, [id, _, _, list]) in table(&files, &names[1])? {
            let list = rated(list).with_context(|| format!("{}:{number}", names[1]))?;
            ratings.insert(id, list);
        }
        for (number, [id, mean, text]) in table(&files, &names[0])? {
            let place = || format!("{}:{number}", names[0]);
            let mean: f64 = mean.parse().with_context(place)?;
            let ratings = ratings
                .remove(id)
                .with_context(|| format!("{}: {} has no ratings of {id:?}", place(), names[1]))?;
            let sum: i32 = ratings.iter().copied().map(i32::from).sum();
            let text = unescaped(text);
            let words: Vec<&str> = text.split_whitespace().collect();
            if (f64::from(sum) / ratings.len() as f64 - mean).abs() > TOLERANCE {
                all.contradicted += 1;
            } else if !seen.insert(words.join(" ").to_lowercase()) {
                all.repeated += 1;
            } else {
                all.sentences.push(Sentence {
                    id: format!("{kind}-{id}"),
                    kind,
                    text,
                    ratings,
                });
            }
        }
    }
    Ok(all)
}

/// The files of a gzipped tar archive, by their names without folders.
fn unpacked(archive: &[u8]) -> Result<HashMap<String, Vec<u8>>> {
    let mut files = HashMap::new();
    for entry in Archive::new(GzDecoder::new(archive)).entries()? {
        let mut entry = entry?;
        let name = entry.path()?.file_name().map(|name| name.to_os_string());
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        files.insert(name.unwrap_or_default().to_string_lossy().into(), bytes);
    }
    Ok(files)
}

/// The rows of a table whose columns stand between tabs, and their lines, from 1.
fn table<'a, const COLUMNS: usize>(
    files: &'a HashMap<String, Vec<u8>>,
    name: &str,
) -> Result<Vec<(usize, [&'a str; COLUMNS])>> {
    let bytes = files
        .get(name)
        .with_context(|| format!("{PACKED} has no {name}"))?;
    let text = std::str::from_utf8(bytes).with_context(|| name.to_string())?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut rows = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let columns: Vec<&str> = line.split('\t').collect();
        let found = columns.len();
        let columns = columns.try_into().ok().with_context(|| {
            format!("{name}:{number}: it has {found} columns; there must be {COLUMNS}")
        })?;
        rows.push((number, columns));
    }
    Ok(rows)
}

fn rated(list: &str) -> Result<Vec<i8>> {
    let ratings: Vec<i8> = serde_json::from_str(list)?;
    ensure!(
        ratings.len() > 1 && ratings.iter().all(|rating| (-4..=4).contains(rating)),
        "the ratings are {list}; they must be at least two, from -4 to 4"
    );
    Ok(ratings)
}

/// Some sentences were taken from web pages as they stood there.
fn unescaped(text: &str) -> String {
    [("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")]
        .into_iter()
        .fold(text.trim().to_string(), |text, (from, to)| {
            text.replace(from, to)
        })
}
