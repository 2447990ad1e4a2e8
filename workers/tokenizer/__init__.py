"""The tokenizer role: turns prompts and chats into token ids in its prompt ring."""
