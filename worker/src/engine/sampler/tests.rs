//! What each parameter does to the draws, alone and in company.

use super::*;

const LOGITS: [f32; 6] = [1.0, 3.0, 2.0, -1.0, 0.5, 2.9];

fn draws(params: SamplingParams, prompt: &[u32], count: usize) -> Vec<u32> {
    let alone = together(vec![(params.clone(), prompt)], count).remove(0);
    // Whatever else is drawn in the same step, before and behind it.
    let loud = SamplingParams {
        temperature: 1.3,
        top_k: 2,
        repetition_penalty: 1.7,
        frequency_penalty: 1.0,
        logit_bias: vec![(4, 50.0)],
        seed: Some(9),
        ..SamplingParams::greedy()
    };
    if params.seed.is_some() || params.temperature < COLDEST {
        let company = together(
            vec![
                (loud.clone(), &[3]),
                (params, prompt),
                (SamplingParams::greedy(), &[]),
                (loud, &[]),
            ],
            count,
        );
        assert_eq!(company[1], alone);
        assert_eq!(company[2], vec![1; count]);
    }
    alone
}

/// The draws of several rows stepped together.
fn together(rows: Vec<(SamplingParams, &[u32])>, count: usize) -> Vec<Vec<u32>> {
    let width = i32::try_from(rows.len()).unwrap();
    let logits = Array::from_slice(&LOGITS.repeat(rows.len()), &[width, 6]);
    let mut samplers: Vec<Sampler> = rows
        .into_iter()
        .map(|(params, prompt)| Sampler::new(params, prompt, None))
        .collect();
    let parameters = Parameters::new(&samplers.iter().collect::<Vec<_>>(), 6).unwrap();
    let histories: Vec<History> = samplers.iter().map(|sampler| sampler.history(6)).collect();
    let mut history = History::join(&histories, 6).unwrap();
    let mut drawn = vec![Vec::new(); samplers.len()];
    for _ in 0..count {
        let numbers = parameters.numbers(samplers.iter_mut());
        let draw = parameters
            .draw(&logits, numbers.as_ref(), &mut history, None)
            .unwrap();
        for (row, token) in drawn.iter_mut().zip(draw.tokens.to_vec_cast::<u32>().unwrap()) {
            row.push(token);
        }
    }
    drawn
}

fn seen(params: SamplingParams) -> Vec<u32> {
    let mut ids = draws(
        SamplingParams {
            seed: Some(1),
            ..params
        },
        &[],
        300,
    );
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn hot() -> SamplingParams {
    SamplingParams {
        temperature: 2.0,
        ..SamplingParams::greedy()
    }
}

#[test]
fn greedy_takes_the_likeliest() {
    assert_eq!(draws(SamplingParams::greedy(), &[], 3), [1, 1, 1]);
}

/// Values that no request can have, as they keep nothing and divide by nothing.
#[test]
fn something_is_always_kept() {
    assert_eq!(seen(SamplingParams { top_p: 0.0, ..hot() }), [1]);
    assert_eq!(seen(SamplingParams { min_p: 2.0, ..hot() }), [1]);
    let penalty = SamplingParams {
        repetition_penalty: 0.0,
        ..SamplingParams::greedy()
    };
    // Divided by next to nothing, the highest score of those seen is the highest by far; and it is a number.
    assert_eq!(draws(penalty, &[2], 2), [2, 2]);
}

#[test]
fn filters_keep_what_they_promise() {
    assert_eq!(seen(hot()), [0, 1, 2, 3, 4, 5]);
    assert_eq!(seen(SamplingParams { top_k: 1, ..hot() }), [1]);
    assert_eq!(seen(SamplingParams { top_k: 3, ..hot() }), [1, 2, 5]);
    assert_eq!(seen(SamplingParams { top_k: 100, ..hot() }), [0, 1, 2, 3, 4, 5]);
    // Shares at temperature 2: 0.28, 0.27, 0.17, 0.10, 0.08, 0.04 (ids 1, 5, 2, 0, 4, 3).
    assert_eq!(seen(SamplingParams { top_p: 0.01, ..hot() }), [1]);
    assert_eq!(seen(SamplingParams { top_p: 0.5, ..hot() }), [1, 5]);
    assert_eq!(seen(SamplingParams { top_p: 0.6, ..hot() }), [1, 2, 5]);
    assert_eq!(
        seen(SamplingParams {
            top_p: 0.99,
            top_k: 2,
            ..hot()
        }),
        [1, 5]
    );
    // exp((x - 3) / 2) >= 0.3 for 3.0, 2.9, 2.0 and 1.0 (0.37).
    assert_eq!(seen(SamplingParams { min_p: 0.3, ..hot() }), [0, 1, 2, 5]);
    assert_eq!(
        seen(SamplingParams {
            min_p: 0.5,
            top_k: 4,
            ..hot()
        }),
        [1, 2, 5]
    );
}

#[test]
fn frequencies_follow_the_distribution() {
    let ids = draws(
        SamplingParams {
            temperature: 1.0,
            seed: Some(3),
            ..SamplingParams::greedy()
        },
        &[],
        4000,
    );
    let total: f32 = LOGITS.iter().map(|logit| logit.exp()).sum();
    for (id, logit) in LOGITS.iter().enumerate() {
        let share = ids.iter().filter(|&&drawn| drawn as usize == id).count() as f32 / 4000.0;
        assert!((share - logit.exp() / total).abs() < 0.03, "token {id}: {share}");
    }
}

#[test]
fn a_seed_repeats_its_draws_and_no_seed_does_not() {
    let seeded = |seed| draws(SamplingParams { seed, ..hot() }, &[], 40);
    assert_eq!(seeded(Some(5)), seeded(Some(5)));
    assert_ne!(seeded(Some(5)), seeded(Some(6)));
    assert_ne!(seeded(None), seeded(None));
}

#[test]
fn penalties_move_on_to_the_next_token() {
    let frequency = SamplingParams {
        frequency_penalty: 0.2,
        ..SamplingParams::greedy()
    };
    // 3.0, 2.9 and 2.0: each token falls by 0.2 with every use.
    assert_eq!(draws(frequency, &[], 5), [1, 5, 1, 5, 1]);
    let presence = SamplingParams {
        presence_penalty: 1.5,
        ..SamplingParams::greedy()
    };
    assert_eq!(draws(presence, &[], 4), [1, 5, 2, 1]);
    let repetition = SamplingParams {
        repetition_penalty: 2.0,
        ..SamplingParams::greedy()
    };
    // Token 1 stands in the prompt: 3.0 / 2.
    assert_eq!(draws(repetition, &[1], 3), [5, 2, 1]);
}

#[test]
fn bias_forces_and_forbids() {
    let params = SamplingParams {
        logit_bias: vec![(1, -100.0), (3, 100.0)],
        ..SamplingParams::greedy()
    };
    assert_eq!(draws(params, &[], 1), [3]);
}

#[test]
fn logprobs_are_those_of_the_distribution() {
    let logits = Array::from_slice(&LOGITS, &[1, 6]);
    let total: f32 = LOGITS.iter().map(|logit| logit.exp()).sum::<f32>().ln();
    let sampler = Sampler::new(SamplingParams::greedy(), &[], Some(2));
    let parameters = Parameters::new(&[&sampler], 6).unwrap();
    let mut draw = parameters
        .draw(&logits, None, &mut History::default(), None)
        .unwrap();
    let DrawnLogprobs { own, top } = draw.logprobs.remove(0).unwrap();
    assert!((own.item_cast::<f32>() - (3.0 - total)).abs() < 1e-5);
    let (ids, values) = top.unwrap();
    assert_eq!(ids.to_vec_cast::<u32>().unwrap(), [1, 5]);
    let values = values.to_vec_cast::<f32>().unwrap();
    assert!((values[0] - (3.0 - total)).abs() < 1e-5 && (values[1] - (2.9 - total)).abs() < 1e-5);
}

#[test]
fn the_coldest_draws_are_greedy() {
    let cold = SamplingParams {
        temperature: 1e-38,
        ..SamplingParams::greedy()
    };
    assert_eq!(draws(cold, &[], 3), [1, 1, 1]);
}

/// What is forbidden is never drawn, however likely it is made; a row that may draw everything draws what it does without flags.
#[test]
fn a_row_draws_only_what_it_may() {
    let hot = |seed| SamplingParams {
        temperature: 2.0,
        logit_bias: vec![(1, 100.0)],
        seed: Some(seed),
        ..SamplingParams::greedy()
    };
    let free = draws(hot(4), &[], 50);
    let [t, f] = [true, false];
    let flags = [f, f, t, t, f, f, t, t, t, t, t, t, f, f, t, f, f, t];
    let flags = Array::from_slice(&flags, &[3, 6]);
    let logits = Array::from_slice(&LOGITS.repeat(3), &[3, 6]);
    let greedy = SamplingParams {
        logit_bias: vec![(5, -1.0)],
        ..SamplingParams::greedy()
    };
    let mut samplers = [hot(3), hot(4), greedy].map(|params| Sampler::new(params, &[], Some(6)));
    let parameters = Parameters::new(&samplers.iter().collect::<Vec<_>>(), 6).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for number in free {
        let numbers = parameters.numbers(samplers.iter_mut());
        let draw = parameters
            .draw(&logits, numbers.as_ref(), &mut History::default(), Some(&flags))
            .unwrap();
        let tokens = draw.tokens.to_vec_cast::<u32>().unwrap();
        seen.insert(tokens[0]);
        assert_eq!(&tokens[1..], [number, 2]);
        let own = draw.logprobs[2].as_ref().unwrap().own.item_cast::<f32>();
        // 2.0 beside 1.9.
        assert!((own + (1.0 + (-0.1_f32).exp()).ln()).abs() < 1e-5, "{own}");
    }
    assert_eq!(Vec::from_iter(seen), [2, 3]);
}
