//! Chat templates in, tool calls and reasoning out.
