"""One engine process per replica: started, watched, diagnosed, restarted, stopped, adopted."""
