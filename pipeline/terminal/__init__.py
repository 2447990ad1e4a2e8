"""Parts that commands share: options of an engine, progress bars, errors and exit statuses."""
