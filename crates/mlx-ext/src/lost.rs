//! A page of a mapped file that can no longer be read: the file was shortened, or its volume is gone.
//!
//! The system answers the access with SIGBUS, which ends the process without a word. A handler finds the file that the
//! address belongs to, says so on standard error, and ends the process with [`LOST_PAGE`]; any other SIGBUS goes where it
//! would have gone. A page that only the GPU reads raises no signal: MLX then reports a failed command.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering::*};

/// Exit code of a process that has lost a page (EX_IOERR of sysexits.h).
pub const LOST_PAGE: u8 = 74;

/// A mapped range. Never freed, since the handler may be looking at it.
struct Node {
    start: AtomicUsize,
    /// 0: not mapped any more.
    end: AtomicUsize,
    message: AtomicPtr<Box<[u8]>>,
    next: *const Node,
}

static NODES: AtomicPtr<Node> = AtomicPtr::new(null_mut());
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// A mapping known to the handler, until dropped; which must come before the mapping's end.
#[derive(Debug)]
pub(crate) struct Known {
    node: &'static Node,
}

// SAFETY: a node's fields are atomic, and `next` is written before the node is shared.
unsafe impl Sync for Node {}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}..{:x}", self.start.load(Relaxed), self.end.load(Relaxed))
    }
}

impl Known {
    /// Makes a mapped file known.
    pub(crate) fn new(bytes: &[u8], path: &Path) -> Self {
        install();
        let message = format!(
            "fatal: {}: a part of this file, which is mapped into memory, cannot be read any more: it was shortened, or its \
             volume is gone\n",
            path.display()
        );
        // Leaked, a few hundred bytes for each file: the handler may read it at any time.
        let message = Box::into_raw(Box::new(message.into_bytes().into_boxed_slice()));
        let start = bytes.as_ptr() as usize;
        let head = NODES.load(Acquire);
        let node = Box::leak(Box::new(Node {
            start: AtomicUsize::new(start),
            end: AtomicUsize::new(start + bytes.len()),
            message: AtomicPtr::new(message),
            next: head,
        }));
        let mut expected = head;
        while let Err(head) = NODES.compare_exchange(expected, node, AcqRel, Acquire) {
            node.next = head;
            expected = head;
        }
        Self { node }
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        self.node.end.store(0, Release);
    }
}

fn install() {
    BEFORE.get_or_init(|| {
        let mut before = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: both structures are zeroed plain old data of the right type; the handler only does what a signal handler
        // may do.
        unsafe {
            let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &action, before.as_mut_ptr());
            before.assume_init()
        }
    });
}

extern "C" fn handler(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid structure to a handler with SA_SIGINFO; nodes and messages are never freed; only
    // async-signal-safe functions are called.
    unsafe {
        let address = (*info).si_addr() as usize;
        let mut node: *const Node = NODES.load(Acquire);
        while let Some(known) = node.as_ref() {
            // The last page goes on behind the file's end.
            let (start, end) = (known.start.load(Relaxed), known.end.load(Acquire));
            if end > 0 && (start..end).contains(&address) {
                if let Some(message) = known.message.load(Relaxed).as_ref() {
                    libc::write(libc::STDERR_FILENO, message.as_ptr().cast(), message.len());
                }
                libc::_exit(c_int::from(LOST_PAGE));
            }
            node = known.next;
        }
        // Not ours: the access is repeated, and whoever was there before sees it.
        match BEFORE.get() {
            Some(before) => libc::sigaction(libc::SIGBUS, before, null_mut()),
            None => libc::signal(libc::SIGBUS, libc::SIG_DFL) as c_int,
        };
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use crate::MappedFile;

    const CHILD: &str = "MLX_EXT_TEST_LOST_PAGE";

    /// The test program starts itself again; the second one reads a page that is gone.
    #[test]
    fn a_lost_page_is_named() {
        if let Some(path) = std::env::var_os(CHILD) {
            let mapped = MappedFile::open(path.as_ref()).unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(1).unwrap();
            std::hint::black_box(mapped.bytes()[100_000]);
            unreachable!("the page was still there");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(200_000).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "lost::tests::a_lost_page_is_named", "--nocapture"])
            .env(CHILD, file.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stderr);
        assert_eq!(child.status.code(), Some(i32::from(super::LOST_PAGE)), "{said}");
        let name = file.path().display().to_string();
        assert!(
            said.contains(&name) && said.contains("cannot be read any more"),
            "{said}"
        );
    }
}
