package api

import (
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
)

// networkOf reads a policy. What the rules of the protos cannot say the domain checks.
func networkOf(p *executorv1.NetworkPolicy) egress.Policy {
	var policy egress.Policy
	switch p.GetMode() {
	case executorv1.NetworkPolicy_MODE_NONE:
		policy.Mode = engine.NetworkNone
	case executorv1.NetworkPolicy_MODE_EGRESS:
		policy.Mode = engine.NetworkEgress
	case executorv1.NetworkPolicy_MODE_HOST:
		policy.Mode = engine.NetworkHost
	default: // unspecified: the server's
	}
	for _, rule := range p.GetRules() {
		read := egress.Rule{Host: rule.GetHost()}
		for _, port := range rule.GetPorts() {
			read.Ports = append(read.Ports, uint16(port)) // a rule of the proto bounds it
		}
		policy.Rules = append(policy.Rules, read)
	}
	return policy
}

// networkProto shows the policy in force.
func networkProto(p egress.Policy) *executorv1.NetworkPolicy {
	shown := &executorv1.NetworkPolicy{Mode: executorv1.NetworkPolicy_MODE_NONE}
	switch p.Mode {
	case engine.NetworkEgress:
		shown.Mode = executorv1.NetworkPolicy_MODE_EGRESS
	case engine.NetworkHost:
		shown.Mode = executorv1.NetworkPolicy_MODE_HOST
	default:
	}
	for _, rule := range p.Rules {
		converted := &executorv1.EgressRule{Host: rule.Host}
		for _, port := range rule.Ports {
			converted.Ports = append(converted.Ports, uint32(port))
		}
		shown.Rules = append(shown.Rules, converted)
	}
	return shown
}
