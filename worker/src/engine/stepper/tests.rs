use super::*;

#[test]
fn a_flight_is_waited_for_when_nobody_goes_on_from_it() {
    let ids = |ids: &[u64]| ids.iter().copied().map(SeqId).collect::<Vec<_>>();
    assert!(is_stranger(&ids(&[1]), &ids(&[2, 3])));
    assert!(!is_stranger(&ids(&[1, 2]), &ids(&[2, 3])));
}
