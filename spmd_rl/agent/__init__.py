"""Conversations of several turns: tools, and agents that speak OpenAI's or Anthropic's protocol."""
