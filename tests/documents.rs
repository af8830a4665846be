//! What readers of the registry's page see of the README.

use std::path::Path;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const SOURCE: &str = "https://docs.rs/crate/candle-cross-entropy/latest/source/";

/// That page has no files beside it: links are whole, and those into this package name files that it has.
#[test]
fn links_of_the_readme_hold() {
    let readme = std::fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    let inline = readme
        .split("](")
        .skip(1)
        .map(|rest| &rest[..rest.find(')').unwrap()]);
    let defined = readme
        .lines()
        .filter_map(|line| Some(line.strip_prefix('[')?.split_once("]: ")?.1));
    let links: Vec<&str> = inline.chain(defined).collect();
    assert!(links.len() > 5);
    for link in links {
        let Some(path) = link.strip_prefix(SOURCE) else {
            assert!(
                link.starts_with("https://") || link.starts_with('#'),
                "{link}"
            );
            continue;
        };
        assert!(Path::new(ROOT).join(path).is_file(), "{path}");
    }
    // A reference without its definition is no link.
    for reference in readme.split("[docs/").skip(1) {
        let name = &reference[..reference.find(']').unwrap()];
        assert!(readme.contains(&format!("\n[docs/{name}]: ")), "{name}");
    }
}
