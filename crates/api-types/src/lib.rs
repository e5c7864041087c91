//! OpenAI and Anthropic wire types, stream events, the SSE codec, one error envelope, the control-socket messages.
