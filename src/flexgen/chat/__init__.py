"""Conversations to prompts: messages as values, the choice of a template, and the process that renders it."""

from __future__ import annotations

from flexgen.chat.messages import Chat, make_chats, parse_messages
from flexgen.chat.process import Limits, TemplateProcess
from flexgen.chat.templates import Templates
from flexgen.chat.tools import ToolUse, parse_tool_use, parse_tools

__all__ = ["Chat", "Limits", "TemplateProcess", "Templates", "ToolUse", "make_chats", "parse_messages", "parse_tool_use", "parse_tools"]
