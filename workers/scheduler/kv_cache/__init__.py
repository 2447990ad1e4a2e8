"""The KV blocks: which sequence holds which, and which of them later sequences may share."""
