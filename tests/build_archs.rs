//! The build script's choice of GPU architectures.

#[path = "../build/archs.rs"]
mod archs;

use archs::{check, default_list, display, gencode, parse_list};

const KNOWN: &str = "sm_75\nsm_80\nsm_86\nsm_90\nsm_100\nsm_120\n";

#[test]
fn lists_are_read_sorted_and_without_repeats() {
    for list in ["80;90a", "90a,80", " sm_90a 8.0 80 ", "8.0\n9.0a\n"] {
        assert_eq!(display(&parse_list(list).unwrap()), "80;90a", "{list}");
    }
    assert_eq!(
        display(&parse_list("120;12.1f;100a").unwrap()),
        "100a;120;121f"
    );
}

#[test]
fn what_is_no_list_is_named() {
    for (list, part) in [
        ("", "empty"),
        (" ; ", "empty"),
        ("80;ampere", "ampere"),
        ("9", "`9`"),
        ("90af", "90af"),
        ("-80", "-80"),
    ] {
        let message = parse_list(list).unwrap_err();
        assert!(message.contains(part), "{list}: {message}");
    }
}

#[test]
fn an_unknown_architecture_is_named_beside_the_known_ones() {
    assert_eq!(check(&parse_list("75;90a;120f").unwrap(), KNOWN), Ok(()));
    let message = check(&parse_list("80;91").unwrap(), KNOWN).unwrap_err();
    assert!(
        message.contains("sm_91") && message.contains("86, 90, 100"),
        "{message}"
    );
}

#[test]
fn machine_code_for_each_and_ptx_of_the_lowest_for_newer_gpus() {
    assert_eq!(
        gencode(&parse_list("90a;80").unwrap()),
        [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_80,code=compute_80",
        ]
    );
    // PTX for 90a would run on Hopper alone.
    assert_eq!(
        gencode(&parse_list("90a").unwrap())[1],
        "-gencode=arch=compute_90,code=compute_90"
    );
}

#[test]
fn the_default_leaves_out_what_nvcc_does_not_know() {
    assert_eq!(display(&default_list(KNOWN)), "75;80;90;100;120");
    assert_eq!(display(&default_list("sm_80\nsm_90\n")), "80;90");
}
