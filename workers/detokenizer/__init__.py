"""The detokenizer role: turns tokens into text, finds stop strings, and alone issues the final answers."""
