"""Conversations to prompts: messages as values, the choice of a template, and the process that renders it."""

from __future__ import annotations

from flexgen.chat.messages import Chat, make_chats, parse_messages
from flexgen.chat.process import Limits, TemplateProcess
from flexgen.chat.templates import Templates

__all__ = ["Chat", "Limits", "TemplateProcess", "Templates", "make_chats", "parse_messages"]
