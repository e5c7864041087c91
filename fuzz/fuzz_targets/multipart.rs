//! Forms: the model's name is found and replaced, and no other byte changes.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use swapd::http::extract::{self, Place};

fuzz_target!(|data: &[u8]| {
    let Some((first, body)) = data.split_first() else {
        return;
    };
    let kind = match first % 4 {
        0 => "multipart/form-data; boundary=XX",
        1 => "multipart/form-data; charset=utf-8; boundary=\"-\"",
        2 => "application/x-www-form-urlencoded",
        _ => match std::str::from_utf8(body) {
            // Any content type at all.
            Ok(kind) => {
                let _ = extract::from_body(kind, &Bytes::from_static(b"--XX\r\n\r\n"));
                return;
            }
            Err(_) => return,
        },
    };
    let body = Bytes::copy_from_slice(body);
    let Ok((name, place)) = extract::from_body(kind, &body) else {
        return;
    };
    assert!(!name.is_empty());
    let range = match &place {
        Place::Form(range) | Place::Encoded(range) => range.clone(),
        // What looks like JSON is taken for JSON.
        _ => return,
    };
    let changed = extract::replace_name(&body, &place, "other/name +&=é");
    assert!(changed.starts_with(&body[..range.start]));
    assert!(changed.ends_with(&body[range.end..]));
    let (again, _) = extract::from_body(kind, &changed).expect("as readable as before");
    assert_eq!(again, "other/name +&=é");
});
