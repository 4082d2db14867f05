"""Tokens: documents are split into parts, tokenised and packed into instances of equal length."""
