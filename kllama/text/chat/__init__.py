"""Conversations: chat templates in their sandbox, and the way from their text to token ids."""
