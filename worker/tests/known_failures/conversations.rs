//! Many conversations at once, each as if it were the only one.

use std::sync::Arc;

use mlxworker::backend::{Backend, GenerationEvent};
use mlxworker::engine::Engine;
use tokio::sync::oneshot;

use super::{engine, first_token, greedy, next, tokens, words};

/// Who talks, and how often each.
const PEOPLE: usize = 16;
const TURNS: usize = 2;

/// What a person says in a turn: nobody says what another does, nor as much.
fn says(person: usize, turn: usize) -> Vec<u32> {
    words(PEOPLE * turn + person, 9 + (5 * person + 7 * turn) % 24)
}

/// How long the reply to it is to be.
fn reply_length(person: usize, turn: usize) -> usize {
    34 + (person * 5 + turn * 3) % 13
}

/// One person's conversation, when it is their turn to begin; a few tokens into the first reply somebody else's. Gives
/// all of it, the tokens that were cached in later turns, and how many ran at the most while this one did.
async fn converse(
    engine: Arc<Engine>,
    person: usize,
    begins: Option<oneshot::Receiver<()>>,
    mut next_one: Option<oneshot::Sender<()>>,
) -> (Vec<u32>, usize, usize) {
    if let Some(begins) = begins {
        begins.await.unwrap();
    }
    let (mut history, mut cached, mut together) = (Vec::new(), 0, 0);
    for turn in 0..TURNS {
        history.extend(says(person, turn));
        let mut generation = engine
            .submit(greedy(history.clone(), reply_length(person, turn)))
            .unwrap();
        for token in 1.. {
            let id = match next(&mut generation).await {
                Some(GenerationEvent::Started { cached_tokens, .. }) => {
                    cached += if turn == 0 { 0 } else { cached_tokens };
                    // Never without a token after it.
                    first_token(&mut generation).await
                }
                Some(GenerationEvent::Token { id, .. }) => id,
                Some(GenerationEvent::Reused { .. }) => continue,
                Some(GenerationEvent::Finished { .. }) => break,
                other => panic!("{other:?}"),
            };
            history.push(id);
            together = together.max(engine.stats().running);
            if token == 1 + person % 3
                && let Some(next_one) = next_one.take()
            {
                next_one.send(()).unwrap();
            }
        }
    }
    (history, cached, together)
}

/// Sixteen people talk at the same time, in a cache with room for all and in one with room for a third of them. Half
/// of them join while another is in the middle of a reply, all go on when their own has ended, and hear what they would
/// hear alone.
#[tokio::test]
async fn interleaved_conversations_stay_apart() {
    const BLOCK: usize = 16;
    let mut alone = Vec::new();
    let solo = engine(|c| {
        c.prefix_cache = false;
        c.max_running = 1;
    })
    .await;
    for person in 0..PEOPLE {
        let mut history = Vec::new();
        for turn in 0..TURNS {
            history.extend(says(person, turn));
            let reply = tokens(&solo, greedy(history.clone(), reply_length(person, turn))).await;
            assert_eq!(reply.len(), reply_length(person, turn));
            history.extend(reply);
        }
        alone.push(history);
    }
    drop(solo);
    // Otherwise nobody would notice who gets whose.
    let heard = (0..PEOPLE).map(|person| {
        let asked = says(person, 0).len();
        alone[person][asked..asked + reply_length(person, 0)].to_vec()
    });
    let mut heard: Vec<Vec<u32>> = heard.map(|reply| reply[..34].to_vec()).collect();
    heard.sort();
    heard.dedup();
    assert_eq!(heard.len(), PEOPLE, "two would hear the same");

    for blocks in [None, Some(48)] {
        let engine = engine(|c| {
            c.block_size = BLOCK;
            c.max_blocks = blocks;
            c.max_running = PEOPLE;
            c.generation_share = 8;
        })
        .await;
        let engine = Arc::new(engine);
        let mut tasks = Vec::new();
        let mut begins = None;
        for person in 0..PEOPLE {
            // Every other one begins at once, and lets the next one begin.
            let (next_one, after) = oneshot::channel();
            let (begins, next_one) = match begins.take() {
                None => {
                    begins = Some(after);
                    (None, Some(next_one))
                }
                first => (first, None),
            };
            tasks.push(tokio::spawn(converse(engine.clone(), person, begins, next_one)));
        }
        let (mut cached, mut together) = (0, 0);
        for (person, task) in tasks.into_iter().enumerate() {
            let (history, reused, most) = task.await.unwrap();
            assert_eq!(history, alone[person], "person {person}, {blocks:?} blocks");
            cached += reused;
            together = together.max(most);
        }
        let preempted = engine.stats().preempted;
        if blocks.is_none() {
            // Each turn continues what the cache knows of its own conversation: all but the last token it heard.
            let all: usize = (0..PEOPLE)
                .map(|person| says(person, 0).len() + reply_length(person, 0) - 1)
                .sum();
            assert_eq!((cached, preempted), (all, 0));
            // Those who begin at once, and some of those that they let begin: how many of these is the machine's affair.
            assert!(together > PEOPLE / 2, "{together} at once");
        } else {
            assert!(preempted > 0, "{together} at once had room");
        }
    }
}
