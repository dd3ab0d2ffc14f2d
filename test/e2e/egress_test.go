package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// egress is a policy of rules HOST:PORT.
func egress(rules ...string) *executorv1.NetworkPolicy {
	p := &executorv1.NetworkPolicy{Mode: executorv1.NetworkPolicy_MODE_EGRESS}
	for _, text := range rules {
		host, port, _ := strings.Cut(text, ":")
		rule := &executorv1.EgressRule{Host: host}
		if port != "" {
			var number uint32
			fmt.Sscan(port, &number)
			rule.Ports = []uint32{number}
		}
		p.Rules = append(p.Rules, rule)
	}
	return p
}

// script is bash with the authority of the tests in /workspace/ca.pem, for all who look.
func (i *internet) script(text string) *executorv1.Command {
	command := bash(`set -e; printf '%s' "$CA" > ca.pem; ` + text)
	const ca = "/workspace/ca.pem"
	command.Env = map[string]string{
		"CA": i.ca, "GIT_SSL_CAINFO": ca, "PIP_CERT": ca, "NODE_EXTRA_CA_CERTS": ca, "npm_config_cafile": ca, "CURL_CA_BUNDLE": ca, "SECURE": i.secure, "PLAIN": i.plain,
	}
	return command
}

// policy lets the names of the test's internet through, and the address they have.
func (i *internet) policy() *executorv1.NetworkPolicy {
	var rules []string
	for _, port := range []string{i.secure, i.plain} {
		for _, host := range []string{"127.0.0.1", "web.test", "*.packages.test", "private.test", "metadata.test", "six.test"} {
			rules = append(rules, host+":"+port)
		}
	}
	return egress(rules...)
}

func TestEgress(t *testing.T) {
	site := startInternet(t)
	d := start(t, "--network-nameserver", site.nameserver)
	c := d.dial()

	for name, test := range map[string]struct{ script, want string }{
		"curl": {`curl -sS https://web.test:$SECURE/hello; curl -sS http://web.test:$PLAIN/hello; echo`, "hello from web.test"},
		"git":  {`git clone -q https://web.test:$SECURE/git/hello.git; cat hello/README; cd hello; git -c user.name=a -c user.email=a@b commit -q --allow-empty -m two; git push -q; git fetch; git status -sb`, "hello from git"},
		"pip": {`pip install -q --disable-pip-version-check --root-user-action=ignore --target lib --index-url https://web.test:$SECURE/simple hello-pkg
PYTHONPATH=lib python3 -c 'import hello_pkg; print(hello_pkg.hello())'`, "hello from pip"},
		"npm": {`mkdir app; cd app; echo '{"name":"app","version":"1.0.0"}' > package.json
npm install --fetch-retries=0 --no-audit --no-fund --loglevel=error --registry=https://web.test:$SECURE/npm/ hello-pkg; node -p 'require("hello-pkg")()'`, "hello from npm"},
	} {
		t.Run(name, func(t *testing.T) {
			k := execute(t, c, &executorv1.ExecuteRequest{Command: site.script(test.script), Network: site.policy()})
			k.wants(t, executorv1.Reason_REASON_EXITED)
			if k.result.GetExitCode() != 0 || !strings.Contains(k.stdout(), test.want) {
				t.Errorf("%s\n%s\n%v", k.stdout(), k.stderr(), k.result)
			}
			if n := k.result.GetEvidence()["egress_connections"]; n == "" || n == "0" || k.result.GetEvidence()["egress_refused"] != "0" {
				t.Errorf("evidence %v", k.result.GetEvidence())
			}
		})
	}
	log, err := os.ReadFile(filepath.Join(d.dir, "log"))
	if err != nil || !strings.Contains(string(log), "verdict=allowed") || strings.Contains(string(log), "hello-pkg") || strings.Contains(string(log), "BEGIN CERT") {
		t.Errorf("the log tells too little or too much: %v", err)
	}
}

// Fault case 28 and what of 26 concerns the network: nothing gets out but through the
// rules, whatever the program tries.
func TestEgressRefuses(t *testing.T) {
	site := startInternet(t)
	d := start(t, "--network-nameserver", site.nameserver)
	c := d.dial()
	const refused = "refused this connection"
	for name, test := range map[string]struct {
		script, reason string
		policy         *executorv1.NetworkPolicy
	}{
		"a name that is not listed":        {`curl -sS http://other.test:$PLAIN/hello`, "NOT_LISTED", nil},
		"a name below no wildcard":         {`curl -sS http://packages.test:$PLAIN/hello`, "NOT_LISTED", nil},
		"a port that is not listed":        {`curl -sS http://web.test:1/hello`, "PORT_NOT_LISTED", nil},
		"the metadata service":             {`curl -sS http://169.254.169.254/latest/meta-data/`, "SPECIAL_ADDRESS", nil},
		"a name for the metadata service":  {`curl -sS http://metadata.test:$PLAIN/`, "SPECIAL_ADDRESS", nil},
		"a private address":                {`curl -sS http://10.11.12.13/`, "SPECIAL_ADDRESS", nil},
		"a name for a private address":     {`curl -sS http://private.test:$PLAIN/`, "SPECIAL_ADDRESS", nil},
		"the host's loopback of version 6": {`curl -sS http://six.test:$PLAIN/`, "SPECIAL_ADDRESS", nil},
		"a mapped address":                 {`curl -sS -g 'http://[::ffff:169.254.169.254]/'`, "SPECIAL_ADDRESS", nil},
		"a name without its address": {`curl -sS http://web.test:$PLAIN/hello`, "SPECIAL_ADDRESS",
			egress("web.test:" + site.plain)},
		"a wide range": {`curl -sS --noproxy '' http://127.0.0.1:$PLAIN/hello`, "SPECIAL_ADDRESS",
			egress("0.0.0.0/0:" + site.plain)},
	} {
		t.Run(name, func(t *testing.T) {
			policy := test.policy
			if policy == nil {
				policy = site.policy()
			}
			k := execute(t, c, &executorv1.ExecuteRequest{Command: site.script(test.script), Network: policy})
			if !strings.Contains(k.stdout(), refused) || !strings.Contains(k.stdout(), test.reason) {
				t.Errorf("%s\n%s", k.stdout(), k.stderr())
			}
			if e := k.result.GetEvidence(); e["egress_refused"] != "1" || e["egress_connections"] != "0" || !strings.Contains(e["egress_first_refused"], test.reason) {
				t.Errorf("evidence %v", e)
			}
		})
	}

	// What goes around the proxy.
	host, _, _ := net.SplitHostPort(site.nameserver)
	around := fmt.Sprintf(`
import errno, os, socket
def fails(what, f, *allowed):
    try:
        f()
    except OSError as e:
        print("ok", what, e.errno if e.errno else e)
    else:
        print("REACHED", what)
def tcp(host, port, family=socket.AF_INET):
    s = socket.socket(family, socket.SOCK_STREAM); s.settimeout(3); s.connect((host, port))
def udp(host, port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3); s.connect((host, port)); s.send(b"x"); s.recv(1)
fails("tcp out", lambda: tcp("1.1.1.1", 443))
fails("tcp to the host's server", lambda: tcp("127.0.0.1", %[1]s))
fails("tcp to the metadata service", lambda: tcp("169.254.169.254", 80))
fails("tcp over version 6", lambda: tcp("2606:4700:4700::1111", 443, socket.AF_INET6))
fails("udp out", lambda: udp("1.1.1.1", 53))
fails("udp to the host's nameserver", lambda: udp(%[2]q, %[3]s))
fails("a name", lambda: socket.getaddrinfo("web.test", 443))
fails("a raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).sendto(b"x" * 8, ("1.1.1.1", 0)))
fails("a packet socket", lambda: socket.socket(17, socket.SOCK_RAW, 0))
print(sorted(os.listdir("/sys/class/net")))
`, site.plain, host, strings.TrimPrefix(site.nameserver, host+":"))
	for name, policy := range map[string]*executorv1.NetworkPolicy{"egress": site.policy(), "none": {Mode: executorv1.NetworkPolicy_MODE_NONE}, "default": nil} {
		t.Run("around, "+name, func(t *testing.T) {
			k := execute(t, c, &executorv1.ExecuteRequest{Command: python(around), Network: policy})
			if strings.Contains(k.stdout(), "REACHED") || strings.Count(k.stdout(), "ok ") != 9 || !strings.HasSuffix(k.stdout(), "['lo']\n") {
				t.Errorf("%s%s", k.stdout(), k.stderr())
			}
			if name != "egress" && k.result.GetEvidence()["egress_connections"] != "" {
				t.Errorf("evidence %v", k.result.GetEvidence())
			}
		})
	}
}

// What is asked for and cannot be, and what a sandbox has is told.
func TestNetworkPolicies(t *testing.T) {
	d := start(t)
	c := d.dial()
	session, err := c.Sessions().CreateSession(t.Context(), &executorv1.CreateSessionRequest{Network: egress("a.example", "*.b.example:443")})
	if err != nil {
		t.Fatal(err)
	}
	parent := session.GetSession().GetName()
	if got := session.GetSession().GetNetwork(); got.GetMode() != executorv1.NetworkPolicy_MODE_EGRESS || len(got.GetRules()) != 2 {
		t.Errorf("the session has %v", got)
	}
	many := egress()
	for i := range 257 {
		many.Rules = append(many.Rules, &executorv1.EgressRule{Host: fmt.Sprintf("h%d.example", i)})
	}
	for name, test := range map[string]struct {
		parent string
		policy *executorv1.NetworkPolicy
		code   codes.Code
		reason string
	}{
		"with a parent":  {parent, egress("a.example"), codes.InvalidArgument, "NETWORK_WITH_PARENT"},
		"none, parent":   {parent, &executorv1.NetworkPolicy{Mode: executorv1.NetworkPolicy_MODE_NONE}, codes.InvalidArgument, "NETWORK_WITH_PARENT"},
		"host":           {"", &executorv1.NetworkPolicy{Mode: executorv1.NetworkPolicy_MODE_HOST}, codes.FailedPrecondition, "NETWORK_NOT_ALLOWED"},
		"no rules":       {"", egress(), codes.InvalidArgument, "NETWORK_RULES"},
		"too many rules": {"", many, codes.InvalidArgument, "INVALID_FIELD"},
		"a bad host":     {"", egress("A.example"), codes.InvalidArgument, "NETWORK_RULE"},
		"a bad port":     {"", egress("a.example:70000"), codes.InvalidArgument, "INVALID_FIELD"},
		"rules alone":    {"", &executorv1.NetworkPolicy{Rules: egress("a.example").GetRules()}, codes.InvalidArgument, "NETWORK_RULES"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{Parent: test.parent, Command: bash("true"), Network: test.policy})
			if status.Code(err) != test.code || client.Reason(err) != test.reason {
				t.Errorf("%v, reason %q", err, client.Reason(err))
			}
		})
	}
	if _, stderr, code := d.ctl("run", "--network", "host", "--", "true"); code != 125 || !strings.Contains(stderr, "--network-max-mode host") {
		t.Errorf("executorctl: %d %s", code, stderr)
	}
	out, stderr, code := d.ctl("run", "--allow", "a.example", "--allow", "[::1]:8080,9090", "-o", "json", "--", "sh", "-c", "echo $HTTPS_PROXY $NO_PROXY")
	if code != 0 || !strings.Contains(out, "http://127.0.0.1:3128 localhost,127.0.0.1,::1") {
		t.Errorf("executorctl: %d %s%s", code, out, stderr)
	}
	k := execute(t, c, &executorv1.ExecuteRequest{Network: egress("a.example"), Command: &executorv1.Command{
		Args: []string{"sh", "-c", "echo $HTTPS_PROXY $https_proxy"}, Env: map[string]string{"HTTPS_PROXY": "mine"},
	}})
	if k.stdout() != "mine http://127.0.0.1:3128\n" {
		t.Errorf("the command's own variable does not win: %q", k.stdout())
	}
	list, err := c.Executor().ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{})
	if err != nil || len(list.GetExecutions()) != 2 || list.GetExecutions()[0].GetNetwork().GetRules()[0].GetHost() != "a.example" {
		t.Errorf("%v, %v", list, err)
	}
	k = execute(t, c, &executorv1.ExecuteRequest{Command: bash("env | grep -ci proxy")})
	if k.stdout() != "0\n" {
		t.Errorf("without network there are %s variables", k.stdout())
	}
}

// With the host's network a sandbox reaches what the host does.
func TestHostNetwork(t *testing.T) {
	needRoot(t)
	site := startInternet(t)
	d := start(t, "--network-max-mode", "host")
	k := execute(t, d.dial(), &executorv1.ExecuteRequest{
		Network: &executorv1.NetworkPolicy{Mode: executorv1.NetworkPolicy_MODE_HOST},
		Command: site.script(`curl -sS http://127.0.0.1:$PLAIN/hello; cat /etc/hosts; env | grep -ci proxy || true; touch /etc/x`),
	})
	hosts, _ := os.ReadFile("/etc/hosts")
	if !strings.HasPrefix(k.stdout(), "hello from 127.0.0.1:") || !strings.HasSuffix(k.stdout(), string(hosts)+"0\n") || k.stderr() != "" {
		t.Errorf("%s%s", k.stdout(), k.stderr())
	}
	k = execute(t, d.dial(), &executorv1.ExecuteRequest{Command: site.script(`curl -sS http://127.0.0.1:$PLAIN/hello`)})
	if k.result.GetExitCode() == 0 {
		t.Errorf("it is the default: %s", k.stdout())
	}
}

// Both a session and a one-shot have their network again after executord was killed.
// While it is away connections fail, and do not hang.
func TestEgressOverARestart(t *testing.T) {
	site := startInternet(t)
	d := start(t, "--network-nameserver", site.nameserver)
	c := d.dial()
	const loop = `rm -f away
until [ -e away ]; do curl -sS -m 20 http://web.test:$PLAIN/hello > out || touch away; sleep 0.1; done; echo away
until curl -sS -m 20 http://web.test:$PLAIN/hello; do sleep 0.1; done; echo back`
	created, err := c.Sessions().CreateSession(t.Context(), &executorv1.CreateSessionRequest{Network: site.policy()})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range []*executorv1.StartExecutionRequest{
		{Command: site.script(loop), Network: site.policy()},
		{Command: site.script(loop), Parent: created.GetSession().GetName()},
	} {
		if r.GetParent() != "" {
			for range 100 {
				got, err := c.Sessions().GetSession(t.Context(), &executorv1.GetSessionRequest{Name: r.GetParent()})
				if err == nil && got.GetSession().GetState() == executorv1.Session_STATE_RUNNING {
					break
				}
				time.Sleep(50 * time.Millisecond)
			}
		}
		started, err := c.Executor().StartExecution(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, started.GetExecution().GetName())
	}
	time.Sleep(time.Second)
	d.kill()
	time.Sleep(5 * time.Second) // longer than the guest keeps a connection waiting
	d.up()
	for _, name := range names {
		s, err := c.Watch(t.Context(), name, nil)
		if err != nil {
			t.Fatal(err)
		}
		k := newChecker()
		if err := k.follow(s); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(k.stdout(), "away\n") || !strings.HasSuffix(k.stdout(), "back\n") || strings.Contains(k.stderr(), "timed out") {
			t.Errorf("%s: %s%s", name, k.stdout(), k.stderr())
		}
	}
	k := execute(t, c, &executorv1.ExecuteRequest{Parent: created.GetSession().GetName(), Command: site.script("curl -sS https://web.test:$SECURE/hello")})
	if !strings.HasPrefix(k.stdout(), "hello from web.test") {
		t.Errorf("a new command in the session: %s%s", k.stdout(), k.stderr())
	}
}

// The end of a download is its own, not the sandbox's or executord's: many at a time,
// and a large one, whose rate is told.
func TestEgressTransfers(t *testing.T) {
	site := startInternet(t)
	d := start(t, "--network-nameserver", site.nameserver)
	c := d.dial()
	before := rss(t, d.process.Process.Pid)
	k := execute(t, c, &executorv1.ExecuteRequest{Network: site.policy(), Command: site.script(
		`curl -sS -p -o /dev/null -w '%{size_download} %{speed_download}\n' http://web.test:$PLAIN/big
curl -sS -o /dev/null -w '%{size_download} %{speed_download}\n' http://web.test:$PLAIN/big
for i in {1..100}; do curl -sS http://web.test:$PLAIN/hello >> all & done; wait; grep -c hello all`)})
	var size, speed [2]float64
	var many int
	if _, err := fmt.Sscan(k.stdout(), &size[0], &speed[0], &size[1], &speed[1], &many); err != nil || size != [2]float64{bigBytes, bigBytes} || many != 100 {
		t.Fatalf("%v: %s%s\n%v", err, k.stdout(), k.stderr(), k.result)
	}
	t.Logf("1 GiB through a tunnel at %.0f MB/s, as plain HTTP at %.0f MB/s; executord grew by %d MiB",
		speed[0]/1e6, speed[1]/1e6, (rss(t, d.process.Process.Pid)-before)>>20)
}
