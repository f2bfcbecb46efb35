"""Files are judged against their source, many in one pass, and what was found is kept as one JSON document."""
