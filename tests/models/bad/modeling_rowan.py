<!DOCTYPE html>
<html>
  <head><title>modeling_rowan.py at main</title></head>
  <body><p>You were sent the page around the file instead of the file.</p></body>
</html>
