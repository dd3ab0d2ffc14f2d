package egress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestPlainHTTP(t *testing.T) {
	var seen *http.Request
	_, address := site(t, func(w http.ResponseWriter, r *http.Request) {
		seen = r
		w.Header().Set("Connection", "X-Hop")
		w.Header().Set("X-Hop", "mine")
		w.Header().Set("X-Kept", "yes")
		_, _ = io.Copy(w, r.Body)
	})
	r := start(t, policyOf(t, "a.example:8080", "127.0.0.1:8080"), resolves("a.example", "127.0.0.1"), address)
	q, err := http.NewRequest(http.MethodPost, "http://A.example:8080/path;x?q=1;2&%zz", strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"Connection": "X-Private", "X-Private": "mine", "Proxy-Authorization": "Basic secret", "Proxy-Connection": "keep-alive",
		"Te": "deflate", "Keep-Alive": "5", "X-Forwarded-For": "1.2.3.4", "X-Kept": "yes", "Accept-Encoding": "br",
	} {
		q.Header.Set(name, value)
	}
	resp, err := r.client().Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "hello" || resp.StatusCode != http.StatusOK {
		t.Errorf("%d %q %v", resp.StatusCode, body, err)
	}
	if resp.Header.Get("X-Hop") != "" || resp.Header.Get("X-Kept") != "yes" {
		t.Errorf("the answer has the header %v", resp.Header)
	}
	for _, name := range []string{"X-Private", "Proxy-Authorization", "Proxy-Connection", "Te", "Keep-Alive"} {
		if value := seen.Header.Get(name); value != "" {
			t.Errorf("the target gets %s: %s", name, value)
		}
	}
	if seen.Header.Get("X-Kept") != "yes" || seen.Header.Get("X-Forwarded-For") != "1.2.3.4" || seen.Header.Get("Accept-Encoding") != "br" {
		t.Errorf("the target gets the header %v", seen.Header)
	}
	if seen.Host != "A.example:8080" || seen.RequestURI != "/path;x?q=1;2&%zz" {
		t.Errorf("the target is asked for %q at %q", seen.RequestURI, seen.Host)
	}
	if got := r.dialled.String(); got != "127.0.0.1:8080" {
		t.Errorf("dialled: %s", got)
	}
}

func TestTunnel(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "secure") }))
	defer server.Close()
	r := start(t, policyOf(t, "example.com", "127.0.0.1"), resolves("example.com", "127.0.0.1"), strings.TrimPrefix(server.URL, "https://"))
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	client := r.client()
	client.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: roots}
	resp, err := client.Get("https://example.com/secret-path?token=secret")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || string(body) != "secure" {
		t.Errorf("%q, %v", body, err)
	}
	r.eventually("the connection is logged", func() bool { return strings.Contains(r.log.String(), "verdict=allowed") })
	for _, want := range []string{"sandbox=box", "host=example.com", "port=443", "sent_bytes=", "received_bytes=", "duration="} {
		if !strings.Contains(r.log.String(), want) {
			t.Errorf("the log lacks %s:\n%s", want, r.log)
		}
	}
	if strings.Contains(r.log.String(), "secret") {
		t.Errorf("the log tells too much:\n%s", r.log)
	}
	if c := r.proxy.Counts(); c != (Counts{Connections: 1}) {
		t.Errorf("%+v", c)
	}
}

func TestRefusals(t *testing.T) {
	resolver := resolves("a.example", "1.1.1.1", "inside.example", "10.0.0.7", "loop.example", "::1", "meta.example", "169.254.169.254", "mixed.example", "10.0.0.7 127.0.0.1 fd00::1")
	r := start(t, policyOf(t, "a.example", "inside.example", "loop.example", "meta.example", "mixed.example", "gone.example", "8.8.8.8"), resolver, "127.0.0.1:1")
	for authority, want := range map[string]struct {
		reason, text string
		status       int
	}{
		"b.example:443":               {notListed, "--allow b.example", 403},
		"b.example:22":                {notListed, "--allow b.example:22", 403},
		"a.example:22":                {portNotListed, "--allow a.example:22", 403},
		"inside.example:443":          {specialAddress, "--allow 10.0.0.7", 403},
		"loop.example:443":            {specialAddress, "--allow ::1", 403},
		"meta.example:443":            {specialAddress, "metadata service", 403},
		"mixed.example:443":           {specialAddress, "--allow 10.0.0.7", 403},
		"127.0.0.1:443":               {specialAddress, "--allow 127.0.0.1", 403},
		"[::1]:8443":                  {specialAddress, "--allow [::1]:8443", 403},
		"[::ffff:127.0.0.1]:443":      {specialAddress, "--allow 127.0.0.1", 403},
		"[64:ff9b::7f00:1]:443":       {specialAddress, "loopback", 403},
		"169.254.169.254:80":          {specialAddress, "metadata service", 403},
		"metadata.google.internal:80": {notListed, "metadata.google.internal", 403},
		"1.1.1.1:443":                 {notListed, "--allow 1.1.1.1", 403},
		"8.8.8.8:53":                  {portNotListed, "--allow 8.8.8.8:53", 403},
		"127.1:443":                   {badTarget, "ends like an address", 400},
		"a.example":                   {badTarget, "HOST:PORT", 400},
		"gone.example:443":            {"", "resolve gone.example: no such host", 502},
		"a.example:443":               {"", "connect to a.example", 502}, // port 1 refuses
	} {
		_, _, status, body := r.connect(authority)
		if status != want.status || !strings.Contains(body, want.text) || !strings.Contains(body, want.reason) {
			t.Errorf("%s: %d %q; want %d, %s, …%s…", authority, status, body, want.status, want.reason, want.text)
		}
		if strings.Contains(body, "192.0.2.53") {
			t.Errorf("%s: it tells the host's nameserver: %s", authority, body)
		}
	}
	if got := r.dialled.String(); got != "1.1.1.1:443" {
		t.Errorf("dialled: %q", got)
	}
	counts := r.proxy.Counts()
	if counts.Connections != 0 || counts.Refused != 17 {
		t.Errorf("%+v", counts)
	}
	if n := strings.Count(r.log.String(), "msg=egress "); n != 19 {
		t.Errorf("%d lines of log:\n%s", n, r.log)
	}
}

// The same holds for plain HTTP, and the first refusal is remembered for the result.
func TestRefusalsOfPlainHTTP(t *testing.T) {
	r := start(t, policyOf(t, "a.example", "inside.example"), resolves("inside.example", "10.0.0.7"), "")
	for address, want := range map[string]string{
		"http://b.example/":                     "NOT_LISTED",
		"http://a.example:8080/":                "PORT_NOT_LISTED",
		"http://inside.example/":                "SPECIAL_ADDRESS",
		"http://169.254.169.254/latest/":        "SPECIAL_ADDRESS",
		"http://metadata.google.internal/x":     "NOT_LISTED",
		"http://[::ffff:a9fe:a9fe]/latest":      "SPECIAL_ADDRESS",
		"http://user:password@b.example/secret": "NOT_LISTED",
	} {
		status, body, header := r.get(address)
		if status != 403 || header.Get("Executord-Refused") != want || !strings.Contains(body, "("+want+")") {
			t.Errorf("%s: %d %v %q", address, status, header, body)
		}
	}
	if strings.Contains(r.log.String(), "secret") || strings.Contains(r.log.String(), "password") || strings.Contains(r.log.String(), "latest") {
		t.Errorf("the log tells too much:\n%s", r.log)
	}
	if c := r.proxy.Counts(); c.Refused != 7 || !strings.Contains(c.FirstRefused, "(") {
		t.Errorf("%+v", c)
	}
	if r.dialled.String() != "" {
		t.Errorf("dialled: %s", r.dialled)
	}
}

// Requests that no proxy takes.
func TestBadRequests(t *testing.T) {
	r := start(t, policyOf(t, "a.example"), nil, "")
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"GET https://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"GET ftp://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"GET http:///x HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"GET http://a.example:0/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"CONNECT / HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"CONNECT a.example HTTP/1.1\r\nHost: a.example\r\n\r\n",
		"GET http://a.example/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
		"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
		"GET http://a.example/ HTTP/1.1\r\nX: " + strings.Repeat("x", 100<<10) + "\r\n\r\n",
	} {
		conn := r.dial()
		_, _ = conn.Write([]byte(request))
		_ = conn.CloseWrite()
		answer, _ := io.ReadAll(conn)
		if len(answer) > 0 && !bytes.HasPrefix(answer, []byte("HTTP/1.1 4")) && !bytes.HasPrefix(answer, []byte("HTTP/1.1 5")) {
			t.Errorf("%.60q: %.200q", request, answer)
		}
	}
	if r.dialled.String() != "" {
		t.Errorf("dialled: %s", r.dialled)
	}
}

// A name that leads elsewhere the second time gains nothing: it is resolved once for a
// connection, and what was checked is dialled.
func TestRebinding(t *testing.T) {
	target := echo(t)
	resolver := resolves("a.example", "1.1.1.1", "a.example", "127.0.0.1", "a.example", "127.0.0.1 1.1.1.2", "a.example", "::ffff:10.0.0.1")
	r := start(t, policyOf(t, "a.example"), resolver, target)
	for i, want := range []int{200, 403, 200, 403} {
		if _, _, status, body := r.connect("a.example:443"); status != want {
			t.Errorf("connection %d: %d %s", i, status, body)
		}
	}
	if got := r.dialled.String(); got != "1.1.1.1:443 1.1.1.2:443" {
		t.Errorf("dialled: %s", got)
	}
	if len(resolver.asked) != 4 {
		t.Errorf("asked for: %q", resolver.asked)
	}
}

// Of several addresses the next is tried when one does not answer.
func TestSeveralAddresses(t *testing.T) {
	_, port, _ := net.SplitHostPort(echo(t))
	rules := policyOf(t, "a.example:"+port, "127.0.0.1:"+port, "127.0.0.2:"+port)
	r := start(t, rules, resolves("a.example", "127.0.0.2 127.0.0.1 127.0.0.1"), "")
	if _, _, status, body := r.connect("a.example:" + port); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	if got := r.dialled.String(); got != "127.0.0.2:"+port+" 127.0.0.1:"+port {
		t.Errorf("dialled: %s", got)
	}
}

// Each direction of a tunnel ends by itself, and what was sent with the request or
// before the end is not lost.
func TestHalfClose(t *testing.T) {
	r := start(t, policyOf(t, "a.example", "127.0.0.1"), resolves("a.example", "127.0.0.1"), echo(t))
	conn := r.dial()
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	var sending sync.WaitGroup
	sending.Go(func() {
		fmt.Fprintf(conn, "CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n")
		_, _ = conn.Write(data)
		_ = conn.CloseWrite()
	})
	got, err := io.ReadAll(conn)
	sending.Wait()
	_, body, _ := bytes.Cut(got, []byte("\r\n\r\n"))
	if err != nil || !bytes.Equal(body, data) {
		t.Errorf("%d bytes of %d, %v", len(body), len(data), err)
	}
	r.eventually("the connection is logged", func() bool {
		return strings.Contains(r.log.String(), fmt.Sprintf("sent_bytes=%d received_bytes=%d", len(data), len(data)))
	})
}

// A target that goes away takes its client with it, and the other way round.
func TestEnds(t *testing.T) {
	gone := make(chan struct{}, 1)
	target := tcpServer(t, func(conn *net.TCPConn) {
		one := make([]byte, 1)
		for {
			if _, err := conn.Read(one); err != nil {
				gone <- struct{}{}
				return
			}
			if one[0] == 'x' {
				_ = conn.SetLinger(0)
				return
			}
		}
	})
	r := start(t, policyOf(t, "a.example", "127.0.0.1"), resolves("a.example", "127.0.0.1"), target)
	conn, reader, _, _ := r.connect("a.example:443")
	fmt.Fprint(conn, "x")
	if _, err := io.ReadAll(reader); err != nil && !strings.Contains(err.Error(), "reset") {
		t.Error(err)
	}
	conn, _, _, _ = r.connect("a.example:443")
	conn.Close()
	select {
	case <-gone:
	case <-time.After(30 * time.Second):
		t.Error("the target does not see that the client has left")
	}
	r.eventually("both are logged", func() bool { return strings.Count(r.log.String(), "verdict=allowed") == 2 })
}

// WebSockets and their like over plain HTTP.
func TestUpgrade(t *testing.T) {
	_, address := site(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "shout" {
			t.Errorf("the target gets %v", r.Header)
			return
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\n")
		line, _ := rw.ReadString('\n')
		fmt.Fprint(conn, strings.ToUpper(line))
	})
	r := start(t, policyOf(t, "a.example", "127.0.0.1"), resolves("a.example", "127.0.0.1"), address)
	conn := r.dial()
	fmt.Fprint(conn, "GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\n")
	reader := bufio.NewReader(conn)
	resp, err := http.ReadResponse(reader, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Upgrade") != "shout" {
		t.Fatalf("%v, %v", resp, err)
	}
	defer resp.Body.Close()
	fmt.Fprint(conn, "hello\n")
	if got, err := io.ReadAll(reader); err != nil || string(got) != "HELLO\n" {
		t.Errorf("%q, %v", got, err)
	}
}

// What comes piece by piece goes on piece by piece.
func TestStreaming(t *testing.T) {
	next := make(chan struct{})
	_, address := site(t, func(w http.ResponseWriter, _ *http.Request) {
		for range 3 {
			fmt.Fprint(w, "tick\n")
			_ = http.NewResponseController(w).Flush()
			<-next
		}
	})
	r := start(t, policyOf(t, "a.example", "127.0.0.1"), resolves("a.example", "127.0.0.1"), address)
	resp, err := r.client().Get("http://a.example/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for range 3 {
		line := make([]byte, 5)
		if _, err := io.ReadFull(resp.Body, line); err != nil || string(line) != "tick\n" {
			t.Fatalf("%q, %v", line, err)
		}
		next <- struct{}{}
	}
}

// Plain requests to one target share a connection, which is logged once.
func TestKeepAlive(t *testing.T) {
	_, address := site(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "x") })
	r := start(t, policyOf(t, "a.example", "127.0.0.1"), resolves("a.example", "127.0.0.1"), address)
	client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: r.address})}}
	for range 20 {
		resp, err := client.Get("http://a.example/")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	client.CloseIdleConnections()
	if c := r.proxy.Counts(); c.Connections != 1 {
		t.Errorf("%+v", c)
	}
	r.proxy.close()
	if n := strings.Count(r.log.String(), "verdict=allowed"); n != 1 {
		t.Errorf("%d lines:\n%s", n, r.log)
	}
}

// The end of a sandbox ends its connections, whatever they are doing.
func TestCloseEndsEverything(t *testing.T) {
	hanging := make(chan struct{})
	_, web := site(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		hanging <- struct{}{}
		<-r.Context().Done()
	})
	r := start(t, policyOf(t, "a.example", "127.0.0.1"), resolves("a.example", "127.0.0.1"), web)
	tunnel, reader, _, _ := r.connect("a.example:443")
	idle := r.dial()
	plain := r.dial()
	fmt.Fprint(plain, "GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n")
	<-hanging
	r.proxy.close()
	for name, conn := range map[string]io.Reader{"a tunnel": reader, "an idle connection": idle, "a request": plain} {
		if _, err := io.Copy(io.Discard, conn); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s: %v", name, err)
		}
	}
	tunnel.Close()
	if len(r.gateway.connections) != 0 {
		t.Errorf("%d places are still taken", len(r.gateway.connections))
	}
}

// A dial that hangs does not keep a proxy from its end.
func TestCloseEndsDials(t *testing.T) {
	r := start(t, policyOf(t, "a.example"), resolves("a.example", "1.1.1.1"), "")
	entered := make(chan struct{}, 2)
	r.proxy.dialer.dial = hangingDial(entered)
	for _, request := range []string{
		"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n",
		"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
	} {
		fmt.Fprint(r.dial(), request)
		<-entered
	}
	r.proxy.close()
}
