"""A build on many machines at once, which Ray schedules: the driver has the journal, workers write what they encode."""
