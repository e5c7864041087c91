//! Which tokens may come next in a reply that has to be of a given form: any JSON, JSON of a schema, what a regular
//! expression matches, one of a few texts, what a grammar derives, calls of tools.
//!
//! Pure: no MLX, no I/O, no clock. The parser is [llguidance](https://github.com/guidance-ai/llguidance); what is added here is
//! a vocabulary without assumptions about its end-of-reply tokens, bounds, and what may come before the constrained text:
//! reasoning, or a tool call in its place.
//!
//! ```
//! use constraint::{Form, Grammars, Opening, Token};
//!
//! // The vocabulary: 256 tokens of one byte, and one that ends a reply.
//! let bytes: Vec<u8> = (0..=255).collect();
//! let end = Token::Special(b"<end>");
//! let tokens = bytes.chunks(1).map(Token::Text).chain([end]);
//! let grammars = Grammars::new(tokens)?;
//!
//! let yes_or_no = grammars.compile(&Form::Choice(vec!["yes".into(), "no".into()]))?;
//! let mut walk = yes_or_no.walk(Opening::default(), &[256]);
//! let allowed = walk.allowed()?.expect("constrained");
//! let list: Vec<u32> = (0..257).filter(|&id| allowed.has(id)).collect();
//! assert_eq!(list, [u32::from(b'n'), u32::from(b'y')]);
//! assert!(!walk.take(u32::from(b'n'))?);
//! assert!(walk.take(u32::from(b'o'))?, "nothing but the end can follow");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | module       | idea                                                        |
//! |--------------|-------------------------------------------------------------|
//! | `vocabulary` | the bytes of all tokens as a tree, once for a model         |
//! | `form`       | what is asked for, and as which grammar it is compiled      |
//! | `walk`       | one reply on its way through a grammar                      |

mod form;
mod vocabulary;
mod walk;

pub use form::{Calls, CompileError, Constraint, Form};
pub use vocabulary::{Grammars, Token, VocabularyError};
pub use walk::{Allowed, Opening, Thinking, Walk, WalkError};
